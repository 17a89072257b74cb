//! Random histories with crashes, kills and failures: what was synced is always there, and a start always succeeds.

use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::*;
use crate::wal::sim::Fault;

#[derive(Clone, Debug)]
enum Written {
    Entry(raftpb::Entry),
    State(raftpb::HardState),
    Snapshot(u64),
}

/// What a start must find after these records, in the words of the rules.
fn expected(records: &[Written]) -> (u64, Vec<(u64, u64)>, raftpb::HardState) {
    let mut hard_state = state(0, 0, 0);
    for record in records {
        if let Written::State(state) = record {
            hard_state = *state;
        }
    }
    let mut start = 0;
    let mut entries: Vec<(u64, u64)> = Vec::new();
    for record in records {
        match record {
            Written::Snapshot(index) if *index <= hard_state.commit() => start = *index,
            Written::Entry(entry) => {
                entries.retain(|(_, index)| *index < entry.index());
                entries.push((entry.term(), entry.index()));
            }
            _ => {}
        }
    }
    entries.retain(|(_, index)| *index > start);
    (start, entries, hard_state)
}

struct Member {
    disk: SimDisk,
    random: StdRng,
    wal: Wal,
    term: u64,
    commit: u64,
    records: Vec<Written>,
    /// So many of them are synced.
    synced: usize,
}

impl Member {
    fn new(seed: u64) -> Member {
        let disk = SimDisk::default();
        let wal = Wal::create(options(&disk), &metadata(), &[], None).unwrap();
        Member { disk, random: StdRng::seed_from_u64(seed), wal, term: 1, commit: 0, records: Vec::new(), synced: 0 }
    }

    fn step(&mut self) {
        if self.random.random_ratio(1, 40) {
            let faults = [Fault::Write, Fault::Sync, Fault::Rename, Fault::Create];
            let fault = faults[self.random.random_range(0..faults.len())];
            self.disk.fail(fault, self.random.random_range(1..4));
        }
        let result = match self.random.random_range(0..20) {
            0..=11 => self.append(),
            12..=14 => self.commit(),
            15 => self.checkpoint(),
            16 => self.wal.purge(u64::MAX, self.random.random_range(0..3)).map(|_| ()),
            17 => self.wal.sync_all().map(|_| self.synced = self.records.len()),
            _ => {
                self.restart();
                Ok(())
            }
        };
        if result.is_err() {
            self.restart();
        }
    }

    fn append(&mut self) -> Result<()> {
        let mut first = self.wal.last_index() + 1;
        if first > self.commit + 1 && self.random.random_ratio(1, 8) {
            // A new leader replaces what is not committed.
            first = self.random.random_range(self.commit + 1..first);
            self.term += 1;
        }
        let count = self.random.random_range(1..6);
        let entries: Vec<_> = (first..first + count)
            .map(|index| entry(self.term, index, &vec![self.random.random(); self.random.random_range(0..300)]))
            .collect();
        let sync = self.random.random_ratio(2, 3);
        self.records.extend(entries.iter().cloned().map(Written::Entry));
        let done = self.wal.append(&entries, None, sync)?;
        if sync || done.cut {
            self.synced = self.records.len();
        }
        Ok(())
    }

    fn commit(&mut self) -> Result<()> {
        self.commit = self.random.random_range(self.commit..=self.wal.last_index());
        let new = state(self.term, 7, self.commit);
        self.records.push(Written::State(new));
        let done = self.wal.append(&[], Some(&new), false)?;
        if done.cut {
            self.synced = self.records.len();
        }
        Ok(())
    }

    fn checkpoint(&mut self) -> Result<()> {
        let index = self.random.random_range(self.wal.start_index().min(self.commit)..=self.commit);
        let Some(term) = self.records.iter().rev().find_map(|record| match record {
            Written::Entry(entry) if entry.index() == index => Some(entry.term()),
            _ => None,
        }) else {
            return Ok(());
        };
        self.records.push(Written::Snapshot(index));
        self.wal.append_snapshot(&snapshot(index, term))?;
        self.synced = self.records.len();
        Ok(())
    }

    fn restart(&mut self) {
        match self.random.random_range(0..3) {
            0 => self.disk.kill(),
            _ => self.disk.crash(self.random.random()),
        }
        let (wal, recovered) = Wal::open(options(&self.disk)).expect("a crash leaves a log that can be opened");
        let entries = recovered.entries.iter().map(|entry| (entry.term(), entry.index())).collect();
        let found = (recovered.snapshot.index(), entries, recovered.hard_state);
        let kept = (self.synced..=self.records.len()).rev().find(|count| expected(&self.records[..*count]) == found);
        let kept = kept.unwrap_or_else(|| {
            panic!("synced {:?}, recovered {found:?}", expected(&self.records[..self.synced]));
        });
        for entry in &recovered.entries {
            let is_written = |record: &Written| matches!(record, Written::Entry(written) if written == entry);
            assert!(self.records[..kept].iter().any(is_written), "an entry came back changed");
        }
        self.records.truncate(kept);
        self.synced = kept;
        self.commit = recovered.hard_state.commit();
        self.term = recovered.hard_state.term().max(recovered.entries.last().map_or(1, raftpb::Entry::term));
        self.wal = wal;
    }
}

fn options(disk: &SimDisk) -> Options {
    Options { segment_bytes: 3000, ..small(disk) }
}

fn run(seed: u64, steps: usize) {
    let mut member = Member::new(seed);
    for _ in 0..steps {
        member.step();
    }
}

#[test]
fn no_crash_loses_what_was_synced() {
    // D-23, D-25, H-24, H-25
    for seed in 0..60 {
        println!("seed {seed}");
        run(seed, 150);
    }
}
