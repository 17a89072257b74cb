//! Which records are read back, and as what. Logs are put together record by record, also such as no writer leaves.

use super::*;
use crate::wal::record::{Frame, kind};

/// Puts segments together.
struct Forge {
    segments: Vec<(String, Vec<u8>)>,
    encoder: Encoder,
}

impl Forge {
    /// Begins segment 0 with its usual records.
    fn new() -> Forge {
        let mut forge = Forge { segments: Vec::new(), encoder: Encoder::default() };
        forge.begin(0, 0);
        forge.encoder.put_snapshot(&walpb::Snapshot::default());
        forge
    }

    fn begin(&mut self, sequence: u64, index: u64) {
        self.end();
        self.segments.push((Name { sequence, index }.to_string(), Vec::new()));
        self.encoder.put_crc();
        self.encoder.put_metadata(&metadata().encode_to_vec());
    }

    fn end(&mut self) {
        if let Some((_, bytes)) = self.segments.last_mut() {
            bytes.append(&mut self.encoder.buffer);
        }
    }

    fn entries(&mut self, term: u64, indexes: impl IntoIterator<Item = u64>) -> &mut Forge {
        for index in indexes {
            self.encoder.put_entry(&entry(term, index, b"data"));
        }
        self
    }

    fn state(&mut self, term: u64, commit: u64) -> &mut Forge {
        self.encoder.put_state(&state(term, 7, commit));
        self
    }

    fn snapshot(&mut self, index: u64, term: u64) -> &mut Forge {
        self.encoder.put_snapshot(&snapshot(index, term));
        self
    }

    /// A record with any type and data.
    fn raw(&mut self, kind: i64, data: &[u8]) -> &mut Forge {
        self.encoder.crc = crc32c::crc32c_append(self.encoder.crc, data);
        let record =
            walpb::Record { r#type: Some(kind), crc: Some(self.encoder.crc), data: Some(Bytes::copy_from_slice(data)) };
        let bytes = record.encode_to_vec();
        let frame = Frame::of(bytes.len() as u64);
        self.encoder.buffer.extend_from_slice(&frame.word().to_le_bytes());
        self.encoder.buffer.extend_from_slice(&bytes);
        self.encoder.buffer.resize(self.encoder.buffer.len() + frame.padding_bytes as usize, 0);
        self
    }

    fn disk(&mut self) -> SimDisk {
        self.end();
        disk_with(&self.segments)
    }

    fn open(&mut self) -> Result<Recovered> {
        Wal::open(small(&self.disk())).map(|(_, recovered)| recovered)
    }

    fn refusal(&mut self) -> String {
        self.open().expect_err("the log must be refused").to_string()
    }
}

fn terms_and_indexes(recovered: &Recovered) -> Vec<(u64, u64)> {
    recovered.entries.iter().map(|entry| (entry.term(), entry.index())).collect()
}

#[test]
fn lower_index_replaces_entry_and_all_after_it() {
    let recovered = Forge::new().entries(1, 1..=4).state(1, 1).entries(2, 2..=3).open().unwrap();
    assert_eq!(terms_and_indexes(&recovered), [(1, 1), (2, 2), (2, 3)]);
}

#[test]
fn missing_entry_refuses_to_start() {
    let text = Forge::new().entries(1, [1, 2, 4]).refusal();
    assert!(text.contains("entry 4 follows, but entry 3 is missing"), "{text}");
    assert!(text.contains("/member/wal/0000000000000000-0000000000000000.wal, offset 144"), "{text}");
    assert!(text.contains("Restore"), "{text}");
}

#[test]
fn second_different_metadata_refuses_to_start() {
    let other = Metadata { node_id: Some(1), ..metadata() };
    let text = Forge::new().entries(1, 1..=2).raw(1, &other.encode_to_vec()).refusal();
    assert!(text.contains("metadata"), "{text}");
}

#[test]
fn same_metadata_again_is_accepted() {
    Forge::new().entries(1, 1..=2).raw(1, &metadata().encode_to_vec()).open().unwrap();
}

#[test]
fn log_without_metadata_refuses_to_start() {
    let mut forge =
        Forge { segments: vec![(Name { sequence: 0, index: 0 }.to_string(), Vec::new())], encoder: Encoder::default() };
    forge.encoder.put_crc();
    assert!(forge.entries(1, 1..=2).refusal().contains("no metadata"));
}

#[test]
fn unknown_record_type_refuses_to_start() {
    for kind in [0, 6, 7, 256 + 2, -1] {
        let text = Forge::new().entries(1, 1..=2).raw(kind, b"x").entries(1, 3..=3).refusal();
        assert!(text.contains(&format!("unexpected block type {kind}")), "{text}");
    }
}

#[test]
fn record_that_does_not_decode_refuses_to_start() {
    for kind in [kind::METADATA, kind::ENTRY, kind::STATE, kind::SNAPSHOT] {
        let text = Forge::new().entries(1, 1..=2).raw(i64::from(kind), b"\xff\xff\xff").refusal();
        assert!(text.contains("metadata") || text.contains("does not decode"), "{text}");
    }
}

#[test]
fn zero_kept_and_left_out_fields_read_the_same() {
    // Term 0, vote 0, commit 0 left out; entry with type 0 written.
    let mut forge = Forge::new();
    forge.raw(2, b"\x08\x00\x10\x01\x18\x01\x22\x01a").raw(3, b"").raw(3, b"\x08\x01\x18\x01");
    let recovered = forge.open().unwrap();
    assert_eq!(recovered.entries[0].data(), b"a");
    assert_eq!(recovered.entries[0].r#type(), raftpb::EntryType::EntryNormal);
    assert_eq!(recovered.hard_state, state(1, 0, 1));
}

#[test]
fn last_snapshot_within_the_commit_index_is_where_raft_starts() {
    let mut forge = Forge::new();
    forge.entries(1, 1..=10).state(1, 8).snapshot(3, 1).snapshot(8, 1).snapshot(9, 1);
    let disk = forge.disk();
    let (wal, recovered) = Wal::open(small(&disk)).unwrap();
    assert_eq!(recovered.snapshot, snapshot(8, 1));
    assert_eq!(recovered.snapshots.iter().map(walpb::Snapshot::index).collect::<Vec<_>>(), [0, 3, 8]);
    assert_eq!(terms_and_indexes(&recovered), [(1, 9), (1, 10)]);
    assert_eq!(wal.start_index(), 8);
}

#[test]
fn snapshot_never_installed_stays_unused_when_the_commit_index_passes_it() {
    // H-24: killed between the record of a leader's snapshot and the hard state that commits it.
    let disk = Forge::new().entries(1, 1..=5).state(1, 5).snapshot(8, 1).disk();
    let (mut wal, recovered) = Wal::open(small(&disk)).unwrap();
    assert_eq!(recovered.snapshot.index(), 0);
    let entries: Vec<_> = (6..=10).map(|index| entry(1, index, b"x")).collect();
    wal.append(&entries, Some(&state(1, 7, 10)), true).unwrap();
    drop(wal);
    let (_, recovered) = Wal::open(small(&disk)).unwrap();
    assert_eq!(recovered.snapshot.index(), 0);
    assert_eq!(recovered.entries.len(), 10);
}

#[test]
fn snapshot_with_another_term_refuses_to_start() {
    let text = Forge::new().entries(1, 1..=5).state(1, 5).snapshot(4, 2).snapshot(4, 1).refusal();
    assert!(text.contains("term"), "{text}");
}

#[test]
fn entries_that_a_leaders_snapshot_replaced_are_not_read() {
    let recovered = Forge::new().entries(2, 1..=20).state(2, 5).snapshot(10, 4).state(4, 10).open().unwrap();
    assert_eq!(terms_and_indexes(&recovered), []);
    let recovered =
        Forge::new().entries(2, 1..=20).state(2, 5).snapshot(10, 4).state(4, 10).entries(4, 11..=12).open().unwrap();
    assert_eq!(terms_and_indexes(&recovered), [(4, 11), (4, 12)]);
}

#[test]
fn commit_index_beyond_the_log_refuses_to_start() {
    let text = Forge::new().entries(1, 1..=5).state(1, 6).refusal();
    assert!(text.contains("index 6 is committed, but the log ends at 5"), "{text}");
}

#[test]
fn first_segments_may_be_missing_before_the_snapshot() {
    let mut forge = Forge::new();
    forge.entries(1, 1..=5).state(1, 5).begin(1, 6);
    forge.entries(1, 6..=9).state(1, 9).snapshot(7, 1).end();
    forge.segments.remove(0);
    let recovered = forge.open().unwrap();
    assert_eq!(recovered.snapshot.index(), 7);
    assert_eq!(terms_and_indexes(&recovered), [(1, 8), (1, 9)]);
}

#[test]
fn missing_first_segment_after_the_snapshot_refuses_to_start() {
    let mut forge = Forge::new();
    forge.entries(1, 1..=5).state(1, 5).begin(1, 6);
    forge.entries(1, 6..=9).end();
    forge.segments.remove(0);
    let text = forge.refusal();
    assert!(text.contains("oldest segment is /member/wal/0000000000000001-0000000000000006.wal"), "{text}");
}

#[test]
fn missing_middle_segment_refuses_to_start() {
    let mut forge = Forge::new();
    for sequence in 1..=2 {
        forge.entries(1, [sequence]).begin(sequence, sequence + 1);
    }
    forge.end();
    forge.segments.remove(1);
    let text = forge.refusal();
    assert!(text.contains("between 0000000000000000-0000000000000000.wal and 0000000000000002"), "{text}");
}

#[test]
fn segment_of_another_log_refuses_to_start() {
    let mut forge = Forge::new();
    forge.entries(1, 1..=2).end();
    forge.encoder.crc ^= 1;
    forge.begin(1, 3);
    assert!(forge.refusal().contains("checksum"));
}

#[test]
fn other_names_in_the_directory_are_ignored() {
    let disk = Forge::new().entries(1, 1..=2).disk();
    for name in ["0-0.wal", "0000000000000000-000000000000000G.wal", "x.wal.broken", "0.tmp", "readme"] {
        disk.write(&dir().join(name), b"something").unwrap();
    }
    let (_, recovered) = Wal::open(small(&disk)).unwrap();
    assert_eq!(recovered.entries.len(), 2);
    assert!(!disk.list(dir()).unwrap().contains(&"0.tmp".to_owned()), "a left-over preallocated file is removed");
}

#[test]
fn garbage_after_a_zero_length_is_accepted_and_zeroed() {
    let mut forge = Forge::new();
    forge.entries(1, 1..=2).end();
    let end = forge.segments[0].1.len();
    forge.segments[0].1.extend_from_slice(&[0; 8]);
    forge.segments[0].1.extend_from_slice(&[0xaa; 600]);
    let disk = forge.disk();
    let (_, recovered) = Wal::open(small(&disk)).unwrap();
    assert_eq!((recovered.entries.len(), recovered.repaired), (2, None));
    assert!(read_segment(&disk, &forge.segments[0].0)[end..].iter().all(|byte| *byte == 0));
}

#[test]
fn entries_keep_their_order_through_gaps_in_term() {
    let recovered = Forge::new().entries(1, 1..=2).entries(5, 3..=4).state(5, 4).open().unwrap();
    assert_eq!(terms_and_indexes(&recovered), [(1, 1), (1, 2), (5, 3), (5, 4)]);
}
