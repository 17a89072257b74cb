//! The files as they lie on a real disk.

use std::{fs, os::unix::fs::PermissionsExt};

use super::*;
use crate::wal::sim::RecordingDisk;

struct Home {
    _dir: tempfile::TempDir,
    wal: PathBuf,
}

impl Home {
    fn new() -> Home {
        let dir = tempfile::tempdir().unwrap();
        let wal = dir.path().join("member/wal");
        Home { _dir: dir, wal }
    }

    fn options(&self) -> Options {
        Options { segment_bytes: 4096, ..Options::new(&self.wal) }
    }

    fn create(&self, options: Options) -> Wal {
        Wal::create(options, &metadata(), &[], None).unwrap()
    }

    fn names(&self) -> Vec<String> {
        let mut names = RealDisk.list(&self.wal).unwrap();
        names.sort();
        names
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.wal.join(name)).unwrap()
    }
}

const FIRST: &str = "0000000000000000-0000000000000000.wal";

#[test]
fn log_reads_back_what_was_appended() {
    let home = Home::new();
    assert!(!Wal::exists(&RealDisk, &home.wal).unwrap());
    let first = [entry(1, 1, b"conf")];
    let mut wal = Wal::create(home.options(), &metadata(), &first, Some(&state(1, 0, 1))).unwrap();
    assert!(Wal::exists(&RealDisk, &home.wal).unwrap());
    let done = wal.append(&[entry(2, 2, b""), entry(2, 3, b"abc")], Some(&state(2, 7, 1)), true).unwrap();
    assert!(done.sync.is_some());
    let done = wal.append(&[], Some(&state(2, 7, 3)), false).unwrap();
    assert_eq!((done.bytes, done.sync), (0, None), "a batch that changes only the commit index waits");
    wal.close().unwrap();

    let (wal, recovered) = Wal::open(home.options()).unwrap();
    assert_eq!(wal.last_index(), 3);
    assert_eq!(recovered.metadata, metadata());
    assert_eq!(recovered.hard_state, state(2, 7, 3));
    assert_eq!(recovered.entries, [entry(1, 1, b"conf"), entry(2, 2, b""), entry(2, 3, b"abc")]);
    assert_eq!(recovered.snapshot.index(), 0);
    assert_eq!(recovered.repaired, None);
}

#[test]
fn first_segment_has_etcds_bytes() {
    let home = Home::new();
    let mut conf_change = entry(1, 1, b"cc");
    conf_change.r#type = Some(1);
    let mut normal = entry(2, 2, b"abc");
    normal.r#type = Some(0);
    drop(Wal::create(home.options(), &metadata(), &[conf_change, normal, entry(2, 3, b"")], Some(&state(2, 0, 3))));

    let mut crc = 0;
    let mut expected = Vec::new();
    let mut record = |kind: u8, data: Option<&[u8]>| {
        let mut body = vec![0x08, kind, 0x10];
        crc = crc32c::crc32c_append(crc, data.unwrap_or_default());
        prost::encoding::encode_varint(u64::from(crc), &mut body);
        if let Some(data) = data {
            body.extend_from_slice(&[0x1a, data.len() as u8]);
            body.extend_from_slice(data);
        }
        let padding = (8 - body.len() % 8) % 8;
        let top = if padding == 0 { 0 } else { 0x80 + padding as u8 };
        expected.extend_from_slice(&[body.len() as u8, 0, 0, 0, 0, 0, 0, top]);
        expected.extend_from_slice(&body);
        expected.resize(expected.len() + padding, 0);
    };
    record(4, None);
    record(1, Some(&metadata().encode_to_vec()));
    record(5, Some(b"\x08\x00\x10\x00"));
    record(2, Some(b"\x08\x01\x10\x01\x18\x01\x22\x02cc"));
    record(2, Some(b"\x10\x02\x18\x02\x22\x03abc"));
    record(2, Some(b"\x10\x02\x18\x03"));
    record(3, Some(b"\x08\x02\x10\x00\x18\x03"));
    let bytes = home.read(FIRST);
    assert_eq!(bytes[..expected.len()], expected);
    assert_eq!(bytes.len(), 4096, "preallocated");
    assert!(bytes[expected.len()..].iter().all(|byte| *byte == 0));
}

#[test]
fn crc_goes_on_as_in_a_real_log() {
    // The crc fields of the metadata and the snapshot record of a log that etcd 3.7.1 began.
    let varint = |mut bytes: &[u8]| prost::encoding::decode_varint(&mut bytes).unwrap() as u32;
    let mut encoder = Encoder::with_crc(varint(&[0xde, 0xc2, 0xc7, 0xb1, 0x07]));
    encoder.put_snapshot(&walpb::Snapshot::default());
    assert_eq!(
        encoder.buffer,
        [
            0x0e, 0, 0, 0, 0, 0, 0, 0x82, 0x08, 0x05, 0x10, 0x8f, 0xc2, 0xdf, 0xed, 0x0f, 0x1a, 0x04, 0x08, 0, 0x10, 0,
            0, 0
        ]
    );
    let mut encoder = Encoder::default();
    encoder.put_crc();
    assert_eq!(encoder.buffer, [0x04, 0, 0, 0, 0, 0, 0, 0x84, 0x08, 0x04, 0x10, 0, 0, 0, 0, 0]);
}

#[test]
fn segment_is_64_million_bytes_and_only_for_the_owner() {
    let home = Home::new();
    let wal = home.create(Options::new(&home.wal));
    let file = fs::metadata(home.wal.join(FIRST)).unwrap();
    assert_eq!(file.len(), 64_000_000);
    assert_eq!(file.permissions().mode() & 0o777, 0o600);
    for dir in [home.wal.as_path(), home.wal.parent().unwrap()] {
        assert_eq!(fs::metadata(dir).unwrap().permissions().mode() & 0o777, 0o700);
    }
    drop(wal);
    Wal::open(Options::new(&home.wal)).unwrap();
    assert_eq!(fs::metadata(home.wal.join(FIRST)).unwrap().len(), 64_000_000);
}

#[test]
fn full_segment_is_cut_and_the_crc_goes_on() {
    let home = Home::new();
    let mut wal = home.create(home.options());
    let mut ends = Vec::new();
    for index in 1..=20 {
        let offset = wal.offset;
        if wal.append(&[entry(1, index, &[index as u8; 700])], Some(&state(1, 7, index)), true).unwrap().cut {
            ends.push((index, offset));
        }
    }
    assert_eq!(ends.iter().map(|(index, _)| *index).collect::<Vec<_>>(), [6, 12, 18]);
    assert_eq!(
        home.names(),
        [
            FIRST,
            "0000000000000001-0000000000000007.wal",
            "0000000000000002-000000000000000d.wal",
            "0000000000000003-0000000000000013.wal"
        ]
    );
    let first = home.read(FIRST);
    assert!(first.len() >= 4096 && !first.ends_with(&[0; 8]), "a finished segment ends with its last record");
    // CRC record with the crc of the last record before, metadata, hard state.
    let second = home.read("0000000000000001-0000000000000007.wal");
    assert_eq!(second[8..11], [0x08, 4, 0x10]);
    assert_eq!(second[24..26], [0x08, 1]);
    let metadata_end = 16 + 8 + 32;
    assert_eq!(second[metadata_end + 8..metadata_end + 10], [0x08, 3]);
    wal.close().unwrap();
    let (wal, recovered) = Wal::open(home.options()).unwrap();
    assert_eq!(recovered.entries.len(), 20);
    assert_eq!((wal.segment_count(), wal.last_index()), (4, 20));
}

#[test]
fn next_segment_is_made_ahead_and_removed_at_a_clean_stop() {
    let home = Home::new();
    let mut wal = home.create(home.options());
    wal.append(&[entry(1, 1, &[b'x'; 2500])], None, true).unwrap();
    assert_eq!(home.names(), [FIRST, "1.tmp"]);
    assert_eq!(home.read("1.tmp").len(), 4096);
    drop(wal);
    let (mut wal, _) = Wal::open(home.options()).unwrap();
    assert_eq!(home.names(), [FIRST], "what a crash left is made anew");
    wal.append(&[entry(1, 2, b"x")], None, true).unwrap();
    assert_eq!(home.names(), [FIRST, "1.tmp"]);
    wal.close().unwrap();
    assert_eq!(home.names(), [FIRST]);
}

#[test]
fn second_opening_is_refused_while_the_first_lives() {
    // D-28
    let home = Home::new();
    let wal = home.create(home.options());
    let error = Wal::open(home.options()).err().expect("it must be refused");
    assert!(matches!(error, Error::Locked { .. }));
    assert!(error.to_string().contains("is locked by another process"), "{error}");
    assert!(error.to_string().contains(FIRST), "{error}");
    drop(wal);
    let (wal, _) = Wal::open(home.options()).unwrap();
    assert!(matches!(Wal::open(home.options()), Err(Error::Locked { .. })));
    drop(wal);
}

#[test]
fn existing_log_is_never_created_over() {
    let home = Home::new();
    drop(home.create(home.options()));
    let before = home.read(FIRST);
    let error = Wal::create(home.options(), &metadata(), &[entry(1, 1, b"x")], None).err().unwrap();
    assert!(matches!(error, Error::Exists { .. }));
    assert_eq!(home.read(FIRST), before);
}

#[test]
fn missing_log_is_not_opened() {
    let home = Home::new();
    assert!(Wal::open(home.options()).is_err());
    fs::create_dir_all(&home.wal).unwrap();
    assert!(matches!(Wal::open(home.options()), Err(Error::NoLog { .. })));
}

#[test]
fn left_over_of_an_interrupted_creation_is_replaced() {
    let home = Home::new();
    let left_over = home.wal.with_file_name("wal.tmp");
    fs::create_dir_all(&left_over).unwrap();
    fs::write(left_over.join("junk"), b"junk").unwrap();
    drop(home.create(home.options()));
    assert_eq!(home.names(), [FIRST]);
    assert!(!left_over.exists());
}

#[test]
fn torn_end_is_cut_and_a_copy_kept() {
    // D-23, H-25
    let home = Home::new();
    let mut wal = home.create(home.options());
    wal.append(&[entry(1, 1, b"whole")], None, true).unwrap();
    let end = wal.offset;
    wal.append(&[entry(1, 2, &[b'x'; 100])], None, true).unwrap();
    drop(wal);
    let path = home.wal.join(FIRST);
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(end + 50).unwrap();
    let torn = home.read(FIRST);

    let (wal, recovered) = Wal::open(home.options()).unwrap();
    let copy = home.wal.join(format!("{FIRST}.broken"));
    let repair = recovered.repaired.expect("the end was torn");
    assert_eq!((repair.segment, repair.offset, repair.copy), (path, end, copy.clone()));
    assert_eq!(recovered.entries, [entry(1, 1, b"whole")]);
    assert_eq!(fs::read(&copy).unwrap(), torn);
    drop(wal);
    let (_, recovered) = Wal::open(home.options()).unwrap();
    assert_eq!(recovered.repaired, None);
    assert!(copy.exists());
}

#[test]
fn purge_keeps_what_a_start_needs() {
    // D-25
    let home = Home::new();
    let mut wal = home.create(home.options());
    for index in 1..=60 {
        wal.append(&[entry(1, index, &[1; 700])], Some(&state(1, 7, index)), true).unwrap();
    }
    let all = wal.segment_count();
    assert_eq!(wal.purge(u64::MAX, 1).unwrap(), 0, "without a snapshot record all is needed");
    wal.append_snapshot(&snapshot(40, 1)).unwrap();
    assert_eq!(wal.purge(u64::MAX, 0).unwrap(), 0, "0 keeps all");
    assert_eq!(wal.purge(u64::MAX, all).unwrap(), 0);
    assert_eq!(wal.purge(u64::MAX, all - 1).unwrap(), 1);
    assert_eq!(wal.purge(6, 1).unwrap(), 0, "the segment with entry 7 begins above 6");
    // Segments begin with entries 1, 7, 13, 19, 25, 31, 37 …: the one with entry 41 is the oldest to stay.
    assert!(wal.purge(u64::MAX, 1).unwrap() > 0);
    assert_eq!(home.names()[0], "0000000000000006-0000000000000025.wal");
    wal.close().unwrap();
    let (_, recovered) = Wal::open(home.options()).unwrap();
    assert_eq!(recovered.snapshot, snapshot(40, 1));
    assert_eq!(recovered.entries.iter().map(raftpb::Entry::index).collect::<Vec<_>>(), (41..=60).collect::<Vec<_>>());
}

#[test]
fn snapshot_beyond_the_durable_commit_index_lets_nothing_be_purged() {
    let home = Home::new();
    let mut wal = home.create(home.options());
    for index in 1..=20 {
        wal.append(&[entry(1, index, &[1; 700])], Some(&state(1, 7, 1)), true).unwrap();
    }
    wal.append_snapshot(&snapshot(15, 1)).unwrap();
    assert_eq!(wal.start_index(), 0);
    assert_eq!(wal.purge(u64::MAX, 1).unwrap(), 0);
    wal.append(&[], Some(&state(1, 7, 20)), true).unwrap();
    assert_eq!(wal.start_index(), 15);
    assert!(wal.purge(u64::MAX, 1).unwrap() > 0);
}

#[test]
fn leaders_snapshot_and_its_hard_state_are_one_write() {
    let home = Home::new();
    let mut wal = home.create(home.options());
    wal.append(&[entry(1, 1, b"old")], Some(&state(1, 7, 1)), true).unwrap();
    let done = wal.install_snapshot(&snapshot(100, 3), &state(3, 0, 100)).unwrap();
    assert!(done.bytes > 0 && done.sync.is_some());
    wal.append(&[entry(3, 101, b"new")], None, true).unwrap();
    drop(wal);
    let (_, recovered) = Wal::open(home.options()).unwrap();
    assert_eq!(recovered.snapshot, snapshot(100, 3));
    assert_eq!(recovered.entries, [entry(3, 101, b"new")]);
}

#[test]
#[should_panic(expected = "leaves a gap")]
fn gap_in_the_entries_panics() {
    let home = Home::new();
    let _ = home.create(home.options()).append(&[entry(1, 2, b"")], None, true);
}

#[test]
fn batch_is_one_write_and_one_sync() {
    let disk = SimDisk::default();
    let mut wal = Wal::create(Options { segment_bytes: 1 << 20, ..small(&disk) }, &metadata(), &[], None).unwrap();
    wal.append(&[entry(1, 1, b"waits")], None, false).unwrap();
    let before = (disk.sync_count(), disk.write_count());
    let batch: Vec<_> = (2..100).map(|index| entry(1, index, b"data")).collect();
    wal.append(&batch, Some(&state(1, 7, 0)), true).unwrap();
    assert_eq!((disk.sync_count(), disk.write_count()), (before.0 + 1, before.1 + 1));
    let done = wal.append(&[], Some(&state(1, 7, 0)), true).unwrap();
    assert_eq!((done.bytes, done.sync), (0, None), "nothing new, nothing to sync");
}

#[test]
fn large_unsynced_batch_is_written() {
    let disk = SimDisk::default();
    let mut wal = Wal::create(Options { segment_bytes: 1 << 20, ..small(&disk) }, &metadata(), &[], None).unwrap();
    let done = wal.append(&[entry(1, 1, &vec![1; UNWRITTEN_BYTES_MAX])], None, false).unwrap();
    assert!(done.bytes > UNWRITTEN_BYTES_MAX as u64 && done.sync.is_none());
    disk.kill();
    assert_eq!(Wal::open(small(&disk)).unwrap().1.entries.len(), 1);
}

#[test]
fn recording_disk_knows_what_was_synced() {
    let home = Home::new();
    let recording = RecordingDisk::new(Arc::new(RealDisk));
    let options = Options { disk: Arc::new(recording.clone()), ..home.options() };
    let mut wal = home.create(options.clone());
    for index in 1..=8 {
        wal.append(&[entry(1, index, &[1; 700])], None, true).unwrap();
    }
    let synced = wal.offset;
    wal.append(&[entry(1, 9, &[1; 900])], None, false).unwrap();
    let mut done = Appended::default();
    wal.flush(&mut done).unwrap();
    let last = home.wal.join("0000000000000001-0000000000000007.wal");
    assert_eq!((recording.notes()[&last].synced, recording.notes()[&last].written), (synced, wal.offset));
    drop(wal);
    recording.cut_to_synced().unwrap();
    let (_, recovered) = Wal::open(options).unwrap();
    assert_eq!(recovered.entries.len(), 8);
}
