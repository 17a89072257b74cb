//! The files as they lie on a real disk.

use super::*;

#[test]
fn log_reads_back_what_was_appended() {
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("wal");
    assert!(!Wal::exists(&RealDisk, &dir).unwrap());
    let first = [entry(1, 1, b"conf")];
    let mut wal = Wal::create(Options::new(&dir), &metadata(), &first, Some(&state(1, 0, 1))).unwrap();
    assert!(Wal::exists(&RealDisk, &dir).unwrap());
    let done = wal.append(&[entry(2, 2, b""), entry(2, 3, b"abc")], Some(&state(2, 7, 1)), true).unwrap();
    assert!(done.sync.is_some());
    let done = wal.append(&[], Some(&state(2, 7, 3)), false).unwrap();
    assert_eq!((done.bytes, done.sync), (0, None), "a batch that changes only the commit index waits");
    wal.close().unwrap();

    let (wal, recovered) = Wal::open(Options::new(&dir)).unwrap();
    assert_eq!(wal.last_index(), 3);
    assert_eq!(recovered.metadata, metadata());
    assert_eq!(recovered.hard_state, state(2, 7, 3));
    assert_eq!(recovered.entries, [entry(1, 1, b"conf"), entry(2, 2, b""), entry(2, 3, b"abc")]);
    assert_eq!(recovered.snapshot.index(), 0);
    assert_eq!(recovered.repaired, None);
}
