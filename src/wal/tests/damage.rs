//! Every cut and every flipped bit of a small log of several segments.

use super::*;

/// A log, where each of its records ends, and what a start must find up to there.
struct Written {
    segments: Vec<(String, Vec<u8>)>,
    /// Segment, offset of the end of a record, and what the log holds up to it.
    points: Vec<(usize, u64, Held)>,
}

#[derive(Clone, Debug, PartialEq)]
struct Held {
    entries: Vec<raftpb::Entry>,
    hard_state: raftpb::HardState,
    start: u64,
}

impl Held {
    fn of(recovered: &Recovered) -> Held {
        Held { entries: recovered.entries.clone(), hard_state: recovered.hard_state, start: recovered.snapshot.index() }
    }
}

/// Appends one record at a time, so that the end of each is known.
fn write_log(record_count: u64, segment_bytes: u64) -> Written {
    let disk = SimDisk::default();
    let options = Options { segment_bytes, ..small(&disk) };
    let mut wal = Wal::create(options, &metadata(), &[], None).unwrap();
    let mut held = Held { entries: Vec::new(), hard_state: state(0, 0, 0), start: 0 };
    let mut points = vec![(0, wal.offset, held.clone())];
    for step in 0..record_count {
        let last = wal.last_index();
        let before = wal.segments.len() - 1;
        let offset = wal.offset;
        let mut bytes = 0;
        match step % 5 {
            3 => {
                held.hard_state = state(2, 7, last);
                wal.append(&[], Some(&held.hard_state), true).unwrap();
            }
            4 if step % 10 == 4 => {
                bytes = wal.append_snapshot(&snapshot(last - 2, 2)).unwrap().bytes;
                held.entries.drain(..(last - 2 - held.start) as usize);
                held.start = last - 2;
            }
            _ => {
                // Lengths that need every padding; no byte is zero, so no sector is.
                let new = entry(2, last + 1, &vec![b'a' + (step % 26) as u8; 20 + (step * 3 % 11) as usize]);
                wal.append(std::slice::from_ref(&new), None, true).unwrap();
                held.entries.push(new);
            }
        }
        let after = wal.segments.len() - 1;
        if after == before {
            points.push((before, wal.offset, held.clone()));
        } else {
            assert_eq!(bytes, 0, "a snapshot record causes no cut");
            let old = read_segment(&disk, &segment_names(&disk)[before]);
            assert!(old.len() as u64 > offset);
            points.push((before, old.len() as u64, held.clone()));
            points.push((after, wal.offset, held.clone()));
        }
    }
    let mut segments: Vec<_> =
        segment_names(&disk).into_iter().map(|name| (name.clone(), read_segment(&disk, &name))).collect();
    // Of the preallocated rest a little is enough.
    let end = points.last().unwrap().1 as usize;
    segments.last_mut().unwrap().1.truncate(end + 24);
    assert!(segments.len() >= 2);
    Written { segments, points }
}

fn open(segments: &[(String, Vec<u8>)], segment_bytes: u64) -> (SimDisk, Result<(Wal, Recovered)>) {
    let disk = disk_with(segments);
    let opened = Wal::open(Options { segment_bytes, ..small(&disk) });
    (disk, opened)
}

/// The log must go on from where it was recovered, and be read back so.
fn check_goes_on(disk: &SimDisk, mut wal: Wal, recovered: &Recovered, segment_bytes: u64) {
    let next = entry(9, wal.last_index() + 1, b"after");
    wal.append(std::slice::from_ref(&next), None, true).unwrap();
    disk.kill();
    drop(wal);
    let mut expected = Held::of(recovered);
    expected.entries.push(next);
    let (_, again) = Wal::open(Options { segment_bytes, ..small(disk) }).unwrap();
    assert_eq!(Held::of(&again), expected);
    assert_eq!(again.repaired, None);
}

#[test]
fn log_cut_anywhere_in_its_last_segment_holds_all_records_before_the_cut() {
    // H-25, D-23
    let written = write_log(27, 400);
    let last = written.segments.len() - 1;
    for length in 0..written.segments[last].1.len() {
        let mut segments = written.segments.clone();
        segments[last].1.truncate(length);
        let (disk, opened) = open(&segments, 400);
        let (wal, recovered) = opened.unwrap_or_else(|error| panic!("cut at {length}: {error}"));
        let whole = |point: &&(usize, u64, Held)| point.0 < last || point.1 <= length as u64;
        let expected = &written.points.iter().rev().find(whole).unwrap().2;
        assert_eq!(&Held::of(&recovered), expected, "cut at {length}");
        check_goes_on(&disk, wal, &recovered, 400);
    }
}

#[test]
fn log_zeroed_from_anywhere_in_its_last_segment_holds_a_prefix() {
    let written = write_log(27, 400);
    let last = written.segments.len() - 1;
    let length = written.segments[last].1.len();
    let first = written.points.iter().find(|point| point.0 == last).unwrap().1 as usize;
    for from in first..length {
        let mut segments = written.segments.clone();
        segments[last].1[from..].fill(0);
        let (_, opened) = open(&segments, 400);
        // A record whose end is zeroed within a sector is no torn one by etcd's rule, unless a piece of it is all zero.
        let Ok((_, recovered)) = opened else { continue };
        check_prefix(&written, &recovered, last, from as u64, &format!("zeroed from {from}"));
    }
}

#[test]
fn earlier_segment_cut_anywhere_loses_nothing_silently() {
    let written = write_log(27, 400);
    for length in 0..written.segments[0].1.len() {
        let mut segments = written.segments.clone();
        segments[0].1.truncate(length);
        // A segment without records is as good as a missing one: no harm if raft starts later.
        if let Ok((_, recovered)) = open(&segments, 400).1 {
            assert_eq!(Held::of(&recovered), written.points.last().unwrap().2, "cut at {length}");
            assert!(length <= 16 && recovered.snapshot.index() > 0, "cut at {length}");
        }
    }
}

/// What is recovered must be what was written up to some point, and that point must not lie before the damage.
fn check_prefix(written: &Written, recovered: &Recovered, segment: usize, offset: u64, context: &str) {
    let found = Held::of(recovered);
    let is_before = |point: &(usize, u64, Held)| (point.0, point.1) <= (segment, offset);
    let first_kept = written.points.iter().rposition(is_before).unwrap_or(0);
    assert!(
        written.points[first_kept..].iter().any(|point| point.2 == found),
        "{context}: recovered what was never there, or lost what lies before the damage"
    );
}

#[test]
fn no_flipped_bit_invents_or_drops_records() {
    // D-23
    let written = write_log(27, 400);
    let last = written.segments.len() - 1;
    let mut repaired_count = 0;
    for segment in 0..written.segments.len() {
        for offset in 0..written.segments[segment].1.len() {
            let original = written.segments[segment].1[offset];
            let flips = (0..8).map(|bit| original ^ (1 << bit)).chain([0, 0xff]);
            for value in flips.filter(|value| *value != original) {
                let mut segments = written.segments.clone();
                segments[segment].1[offset] = value;
                let context = format!("segment {segment}, offset {offset}: {original:#04x} to {value:#04x}");
                let (disk, opened) = open(&segments, 400);
                let Ok((wal, recovered)) = opened else { continue };
                check_prefix(&written, &recovered, segment, offset as u64, &context);
                // Only the last record may be taken for a torn one; before it every record is followed by an intact
                // one, and the metadata, the padding and the crc of a CRC record hold nothing of a member's state.
                let found = Held::of(&recovered);
                let after_loss = &written.points[written.points.len() - 2].2;
                let complete = &written.points[written.points.len() - 1].2;
                assert!(found == *complete || (segment == last && found == *after_loss), "{context}");
                if recovered.repaired.is_some() {
                    repaired_count += 1;
                    let copy = format!("{}.broken", written.segments[segment].0);
                    assert_eq!(read_segment(&disk, &copy), segments[segment].1, "{context}: the copy differs");
                }
                if value == original ^ 1 {
                    check_goes_on(&disk, wal, &recovered, 400);
                }
            }
        }
    }
    assert!(repaired_count > 0, "no flip looked like a torn end");
}

#[test]
fn damaged_log_is_left_as_it_was() {
    let written = write_log(27, 400);
    let mut segments = written.segments.clone();
    segments[0].1[300] ^= 0x10;
    let (disk, opened) = open(&segments, 400);
    let Err(error @ Error::Damaged { .. }) = opened else { panic!("damage was not found") };
    assert!(error.to_string().contains(&segments[0].0), "{error}");
    assert_eq!(segment_names(&disk), segments.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>());
    for (name, bytes) in &segments {
        assert_eq!(&read_segment(&disk, name), bytes);
    }
}

#[test]
fn lost_sector_of_the_last_write_is_cut() {
    // One write of many sectors, of which any one may be lost, is torn there.
    let disk = SimDisk::default();
    let options = Options { segment_bytes: 20_000, ..small(&disk) };
    let mut wal = Wal::create(options.clone(), &metadata(), &[entry(1, 1, b"first")], None).unwrap();
    let start = wal.offset as usize;
    let batch: Vec<_> = (2..=30).map(|index| entry(1, index, &[b'z'; 173])).collect();
    wal.append(&batch, None, true).unwrap();
    let end = wal.offset as usize;
    let name = segment_names(&disk)[0].clone();
    let bytes = read_segment(&disk, &name);
    for sector in start.div_ceil(512)..end / 512 {
        let mut torn = bytes.clone();
        torn[sector * 512..(sector + 1) * 512].fill(0);
        let (_, opened) = open(&[(name.clone(), torn)], 20_000);
        let (_, recovered) = opened.unwrap_or_else(|error| panic!("sector {sector}: {error}"));
        assert!(!recovered.entries.is_empty() && recovered.entries.len() < 30);
        assert_eq!(recovered.entries[1..], batch[..recovered.entries.len() - 1]);
    }
}
