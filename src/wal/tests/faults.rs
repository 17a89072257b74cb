//! A disk that is full or fails.

use super::*;
use crate::wal::sim::Fault;

fn new_log(disk: &SimDisk) -> Wal {
    Wal::create(small(disk), &metadata(), &[entry(1, 1, b"first")], Some(&state(1, 7, 1))).unwrap()
}

fn reopen(disk: &SimDisk) -> (Wal, Recovered) {
    disk.kill();
    Wal::open(small(disk)).unwrap()
}

#[test]
fn failed_write_or_sync_poisons_the_log() {
    for fault in [Fault::Write, Fault::Sync] {
        let disk = SimDisk::default();
        let mut wal = new_log(&disk);
        disk.fail(fault, 1);
        let error = wal.append(&[entry(1, 2, b"second")], None, true).unwrap_err();
        let text = error.to_string();
        let action = if fault == Fault::Write { "write to" } else { "sync" };
        assert!(text.starts_with(&format!("write-ahead log: cannot {action} /member/wal/")), "{text}");
        // The disk works again, but nobody knows what is on it.
        let is_poisoned = |result: Result<Appended>| match result {
            Err(Error::Poisoned(first)) => first == text,
            _ => false,
        };
        assert!(is_poisoned(wal.append(&[entry(1, 2, b"second")], None, true)));
        assert!(is_poisoned(wal.append_snapshot(&snapshot(1, 1))));
        assert!(is_poisoned(wal.sync_all()));
        assert!(matches!(wal.purge(1, 1), Err(Error::Poisoned(_))));
        assert!(matches!(wal.close(), Err(Error::Poisoned(_))));
    }
}

#[test]
fn failed_cut_poisons_the_log_and_loses_nothing_synced() {
    for fault in [Fault::Write, Fault::Sync, Fault::Rename, Fault::Create] {
        for nth in 1..=4 {
            let disk = SimDisk::default();
            let mut wal = new_log(&disk);
            disk.fail(fault, nth);
            let mut acknowledged = 1;
            while acknowledged < 20 {
                match wal.append(&[entry(1, acknowledged + 1, &[b'x'; 300])], None, true) {
                    Ok(_) => acknowledged += 1,
                    Err(_) => break,
                }
            }
            let (mut wal, recovered) = reopen(&disk);
            assert!(recovered.entries.len() as u64 >= acknowledged, "{fault:?} {nth}");
            let next = entry(1, wal.last_index() + 1, b"next");
            wal.append(&[next], None, true).unwrap();
        }
    }
}

#[test]
fn full_disk_stops_the_log_and_a_restart_with_space_loses_nothing_acknowledged() {
    for room in (0..3000).step_by(7) {
        let disk = SimDisk::default();
        let mut wal = new_log(&disk);
        disk.set_room(Some(room));
        let mut acknowledged = 1;
        let error = loop {
            match wal.append(&[entry(1, acknowledged + 1, &[b'x'; 90])], None, true) {
                Ok(_) => acknowledged += 1,
                Err(error) => break error,
            }
        };
        assert!(error.to_string().contains("no storage space"), "{error}");
        drop(wal);
        disk.set_room(None);
        let (mut wal, recovered) = reopen(&disk);
        assert!(recovered.entries.len() as u64 >= acknowledged, "room {room}");
        wal.append(&[entry(1, wal.last_index() + 1, b"goes on")], None, true).unwrap();
    }
}

#[test]
fn full_disk_does_not_stop_a_log_whose_segment_has_room() {
    let disk = SimDisk::default();
    let mut wal = new_log(&disk);
    disk.set_room(Some(0));
    wal.append(&[entry(1, 2, b"fits")], None, true).unwrap();
    // Half full: the next segment cannot be made ahead.
    wal.append(&[entry(1, 3, &[b'x'; 500])], None, true).unwrap();
    wal.append(&[entry(1, 4, b"fits")], None, true).unwrap();
    drop(wal);
    let (_, recovered) = reopen(&disk);
    assert_eq!(recovered.entries.len(), 4);
}

#[test]
fn interrupted_creation_leaves_no_log() {
    for fault in [Fault::Write, Fault::Sync, Fault::Rename, Fault::Create] {
        let disk = SimDisk::default();
        disk.fail(fault, 1);
        Wal::create(small(&disk), &metadata(), &[entry(1, 1, b"first")], None).err().expect("it must fail");
        disk.kill();
        assert!(!Wal::exists(&disk, dir()).unwrap());
        let wal = new_log(&disk);
        drop(wal);
        assert_eq!(reopen(&disk).1.entries.len(), 1);
    }
}

#[test]
fn log_is_created_as_a_whole_or_not_at_all() {
    for seed in 0..200 {
        let disk = SimDisk::default();
        disk.create_dir(Path::new("/member")).unwrap();
        disk.sync_dir(Path::new("/")).unwrap();
        disk.fail(Fault::Sync, 1 + seed % 4);
        let created = Wal::create(small(&disk), &metadata(), &[entry(1, 1, b"first")], None).is_ok();
        disk.crash(seed);
        if Wal::exists(&disk, dir()).unwrap() {
            assert_eq!(Wal::open(small(&disk)).unwrap().1.entries.len(), 1, "seed {seed}");
        } else {
            assert!(!created, "seed {seed}");
            new_log(&disk);
        }
    }
}

#[test]
fn nothing_is_synced_with_unsafe_no_fsync() {
    let disk = SimDisk::default();
    let options = Options { unsafe_no_fsync: true, ..small(&disk) };
    let mut wal = Wal::create(options.clone(), &metadata(), &[], None).unwrap();
    for index in 1..=20 {
        let done = wal.append(&[entry(1, index, &[b'x'; 100])], None, true).unwrap();
        assert!(done.bytes > 100 && done.sync.is_none());
    }
    assert!(wal.segment_count() > 1);
    wal.close().unwrap();
    let (_, recovered) = Wal::open(options).unwrap();
    assert_eq!(recovered.entries.len(), 20);
    assert_eq!(disk.sync_count(), 0);
}
