//! What goes wrong: each fault of a plan, carried out when its time has come, and how a lost member is replaced.

use std::path::Path;

use actd::{
    apply,
    cluster::{Change, Members},
    raft,
    wal::{
        disk::{Disk, Open},
        sim::{Fault as DiskFault, SimDisk},
    },
};
use rand::RngExt;
use tokio::sync::oneshot;

use super::{
    client::Kind,
    member::Member,
    plan::{Fault, MS, SECOND},
    world::{Event, SKEW, World, cluster_member},
};

impl World {
    pub fn fault(&mut self, fault: usize) {
        if self.is_calm {
            return;
        }
        self.note(&[fault as u64]);
        let fault = self.plan.faults[fault].fault.clone();
        self.say(|| format!("FAULT {fault:?}"));
        let is_done = self.carry_out(fault);
        // Instead of what cannot be done now somebody hesitates, so that no run is without trouble.
        if is_done || self.some_member().is_some_and(|m| self.pause(m, 300 * MS)) {
            self.stats.faults += 1;
        }
    }

    /// Whether it does anything to anybody.
    fn carry_out(&mut self, fault: Fault) -> bool {
        let now = self.now;
        let fault = fault.of(self.members.len());
        match fault {
            Fault::Crash { member, power, down } => self.crash_for(member, power, down),
            Fault::CrashAll { power, down } => {
                let crashed: Vec<bool> = (0..self.members.len()).map(|m| self.crash_for(m, power, down)).collect();
                if crashed.len() > 1 && !(0..self.members.len()).any(|m| self.is_up(m)) {
                    self.mark("all are down at once");
                }
                crashed.contains(&true)
            }
            Fault::Pause { member, for_ } => self.pause(member, for_),
            Fault::Cut { links, for_ } => self.cut(&links, now + for_),
            Fault::Lossy { loss, for_ } => {
                self.loss = (loss, now + for_);
                self.members.len() > 1
            }
            Fault::SlowDisk { member, each, for_ } => {
                self.members[member].slow = (each, now + for_);
                self.is_up(member)
            }
            Fault::SlowApply { member, each, for_ } => {
                self.members[member].slow_apply = (each, now + for_);
                self.is_up(member)
            }
            Fault::DiskError { member, sync } => {
                let kind = if sync { DiskFault::Sync } else { DiskFault::Write };
                self.members[member].disk.fail(kind, 1);
                self.is_up(member)
            }
            Fault::DiskFull { member, for_ } => {
                let room = self.rng.random_range(0..3_000);
                self.members[member].disk.set_room(Some(room));
                self.members[member].full_until = now + for_;
                self.after(for_, Event::RoomAgain(member));
                self.is_up(member)
            }
            Fault::FlipLog { member, place, down } => {
                let is_done = self.destroy(member, down, |disk, begin| flip(disk, begin, place));
                if is_done {
                    self.members[member].is_flipped = true;
                    self.mark("a bit of the log flipped");
                }
                is_done
            }
            Fault::LoseSyncs { member, sectors, down } => {
                let is_done = self.destroy(member, down, |disk, _| lose_syncs(disk, sectors));
                if is_done {
                    self.mark("a log lost what was synced");
                }
                is_done
            }
            Fault::Transfer { to } => {
                let id = self.members[to].id;
                let leads = |world: &World, m: usize| {
                    world.is_awake(m) && world.members[m].process.as_ref().is_some_and(|p| p.reading().is_leader)
                };
                let leader = (0..self.members.len()).find(|m| leads(self, *m) && *m != to);
                leader.is_some_and(|m| {
                    (self.handed_over, self.handed_to) = (now, Some(to));
                    self.process(m).raft_tx.control(raft::Control::Transfer { to: id });
                    self.pump(m);
                    true
                })
            }
            Fault::Stop { member } => {
                if !self.is_awake(member) {
                    return false;
                }
                // It hands over first, if it leads.
                if self.process(member).reading().is_leader {
                    (self.handed_over, self.handed_to) = (now, None);
                }
                self.process(member).raft_tx.control(raft::Control::Transfer { to: 0 });
                self.pump(member);
                let epoch = self.members[member].epoch;
                let patience = self.draw((MS, 500 * MS));
                self.after(patience, Event::Stopped(member, epoch));
                true
            }
            Fault::StoreError { member, sync } => {
                if !self.is_up(member) {
                    return false;
                }
                self.members[member].is_store_broken = true;
                let stores = self.members[member].stores();
                let store = stores.current().expect("a member that is up has a store");
                if sync {
                    store.fail_sync_after(0)
                } else {
                    store.fail_commit_after(0)
                }
                true
            }
            Fault::Defragment { member } => {
                if !self.is_up(member) {
                    return false;
                }
                let is_cleaning = self.process(member).is_cleaning();
                self.members[member].defragments_later = !is_cleaning;
                self.defragment(member);
                self.pump(member);
                // Without anything to wait for it is answered at once, and that is nobody's trouble.
                is_cleaning
            }
            Fault::AddLearner => {
                let may =
                    |members: Members| members.iter().count() < 6 && !members.iter().any(|member| member.is_learner);
                let may = self.membership().is_some_and(may);
                if may {
                    self.add_member();
                }
                may
            }
            Fault::Promote => self.promote(),
            Fault::Remove { member } => self.remove(member, 2),
            Fault::Shrink { to } => self.shrink(to),
            Fault::Clock { member, by_ms, down } => {
                let clock = &mut self.members[member].clock_ms;
                *clock = clock.saturating_add_signed(by_ms);
                self.members[member].is_clock_set = true;
                // Of what runs here only a start looks at it.
                self.crash_for(member, false, down)
            }
        }
    }

    pub fn defragment(&mut self, m: usize) {
        let (done, answer) = oneshot::channel();
        let process = self.process(m);
        process.apply_tx.control(apply::Control::Defragment(done));
        process.defragments.push(answer);
    }

    fn pause(&mut self, m: usize, for_: u64) -> bool {
        if self.is_up(m) {
            let until = self.now + for_;
            self.members[m].paused_until = self.members[m].paused_until.max(until);
        }
        self.is_up(m)
    }

    fn crash_for(&mut self, m: usize, power: bool, down: u64) -> bool {
        let was_up = self.is_up(m);
        if was_up {
            self.crash(m, power);
            self.restart_after(m, down);
        }
        was_up
    }

    /// The power goes, and with it something of the log. Data is destroyed on one member in a run, so on a minority.
    fn destroy(&mut self, m: usize, down: u64, how: impl FnOnce(&SimDisk, u64) -> Option<()>) -> bool {
        let is_first = self.members.iter().all(|member| !member.may_refuse);
        if !is_first || !self.may_lose(m) || !self.is_up(m) {
            return false;
        }
        self.crash_for(m, true, down);
        let config = self.plan.config.clone();
        let member = &mut self.members[m];
        // Whoever does not start as it is has nothing to lose.
        let Some(held) = member.held(&config) else { return false };
        let is_done = how(&member.disk, held.begin).is_some();
        if is_done {
            member.had_synced = Some(held);
            member.may_refuse = true;
        }
        is_done
    }

    /// A cluster goes on without a member's data only if all others have theirs.
    fn may_lose(&self, m: usize) -> bool {
        let Some(members) = self.membership() else { return false };
        let healthy = |id| self.index_of(id).is_some_and(|m| self.members[m].lost.is_none());
        let voters: Vec<u64> = members.iter().filter(|member| !member.is_learner).map(|member| member.id).collect();
        !self.is_smaller
            && voters.len() >= 3
            && voters.iter().all(|id| healthy(*id))
            && voters.contains(&self.members[m].id)
    }

    /// A live member that an administrator may talk to.
    fn some_member(&mut self) -> Option<usize> {
        let up: Vec<usize> = (0..self.members.len()).filter(|m| self.is_up(*m)).collect();
        (!up.is_empty()).then(|| up[self.rng.random_range(0..up.len())])
    }

    fn change(&mut self, change: Change) {
        if let Some(m) = self.some_member() {
            self.begin(None, m, Kind::Change(change));
        }
    }

    /// A new member, first as a learner. It starts before or after the others know of it.
    fn add_member(&mut self) -> usize {
        self.next_member += 1;
        let id = self.next_member << 32 | self.next_member;
        self.members.push(Member::new(id, true));
        let m = self.members.len() - 1;
        self.members[m].skew = self.rng.random_range(SKEW);
        self.change(Change::Add(cluster_member(id, true)));
        let delay = self.draw((10 * MS, 2 * SECOND));
        self.restart_after(m, delay);
        self.mark("learner added");
        m
    }

    /// A learner that has come far enough becomes a voter.
    fn promote(&mut self) -> bool {
        let Some(members) = self.membership() else { return false };
        let executed = self.truth.executed;
        for member in members.iter().filter(|member| member.is_learner) {
            let Some(m) = self.index_of(member.id) else { continue };
            if self.is_up(m) && self.process(m).applied() * 10 >= executed * 9 {
                self.change(Change::Promote(member.id));
                return true;
            }
        }
        false
    }

    /// The others leave one by one, whoever leads last.
    pub fn shrink(&mut self, to: usize) -> bool {
        let Some(members) = self.membership() else { return false };
        let voters = members.iter().filter(|member| !member.is_learner).filter_map(|member| self.index_of(member.id));
        let mut others: Vec<usize> = voters.collect();
        if !others.contains(&to) || !self.is_up(to) {
            return false;
        }
        others.retain(|m| *m != to);
        others.sort_by_key(|m| self.is_up(*m) && self.process(*m).reading().is_leader);
        let Some(next) = others.first() else {
            self.mark("one voter is left");
            return false;
        };
        let is_removed = self.remove(*next, 1);
        if is_removed {
            let soon = self.draw((10 * MS, 500 * MS));
            self.after(soon, Event::Shrink(to));
        }
        is_removed
    }

    /// As the strict check has it: not if those who remain and are there are too few, and not if fewer than `least` remain.
    fn remove(&mut self, m: usize, least: usize) -> bool {
        let Some(members) = self.membership() else { return false };
        let id = self.members[m].id;
        let voters = members.iter().filter(|member| !member.is_learner);
        let others: Vec<u64> = voters.map(|member| member.id).filter(|other| *other != id).collect();
        let there = others.iter().filter(|id| self.index_of(**id).is_some_and(|m| self.is_up(m))).count();
        // A cluster that is about to lose a member's data has none to give away.
        let is_whole = self.members.iter().all(|member| !member.may_refuse);
        let may = is_whole && members.get(id).is_some() && others.len() >= least && there > others.len() / 2;
        if may {
            self.is_smaller = true;
            self.change(Change::Remove(id));
            self.mark("member removed");
        }
        may
    }

    /// A member whose data is lost leaves for good; a new one comes in its place, and votes once it has come far enough. Any of
    /// these changes may fail, so each is asked for until it is there.
    pub fn replace(&mut self, m: usize) {
        if self.members[m].lost.as_deref() == Some(REMOVED) {
            return;
        }
        self.after(SECOND, Event::Replace(m));
        let id = self.members[m].id;
        let Some(members) = self.membership() else { return };
        if members.get(id).is_some() {
            return self.change(Change::Remove(id));
        }
        let learners = members.iter().filter(|member| member.is_learner).count();
        let Some(new) = self.members[m].replaced_by else {
            if learners == 0 {
                self.members[m].replaced_by = Some(self.add_member());
            } else {
                self.promote();
            }
            return;
        };
        let new = self.members[new].id;
        match members.get(new) {
            // The others may be as many as may be.
            None if learners > 0 && self.promote() => {}
            None => self.change(Change::Add(cluster_member(new, true))),
            Some(member) if member.is_learner => drop(self.promote()),
            Some(_) => {
                self.members[m].lost = Some(REMOVED.to_owned());
                self.mark("a lost member is replaced");
            }
        }
    }

    /// Whoever lost its data is replaced, and nobody is about to find that it has.
    pub fn is_whole(&self) -> bool {
        self.members.iter().all(|member| match &member.lost {
            Some(reason) => reason == REMOVED,
            None => member.restart_at.is_none(),
        })
    }
}

/// Why a member is down for good, once nobody has to care.
pub const REMOVED: &str = "removed";

const LOG: &str = "/member/wal";

/// Flips a bit in what a start reads: from the segment of the snapshot record on.
fn flip(disk: &SimDisk, begin: u64, place: u64) -> Option<()> {
    let mut paths = segments(disk)?;
    let first = paths.iter().rposition(|(_, index)| *index <= begin)?;
    let written = paths.drain(first..).map(|(path, _)| {
        let bytes = disk.read(Path::new(&path)).ok()?;
        Some((path, written_end(&bytes), bytes))
    });
    let written: Vec<_> = written.collect::<Option<_>>()?;
    let all: usize = written.iter().map(|(_, end, _)| end).sum();
    let mut at = place as usize % all.max(1);
    for (path, end, mut bytes) in written {
        if at < end {
            bytes[at] ^= 1 << (place >> 61);
            return overwrite(disk, &path, &bytes);
        }
        at -= end;
    }
    None
}

/// The last sectors of the log are as if they had never been written, though the store may have what they led to.
fn lose_syncs(disk: &SimDisk, sectors: usize) -> Option<()> {
    let (path, _) = segments(disk)?.pop()?;
    let mut bytes = disk.read(Path::new(&path)).ok()?;
    let end = written_end(&bytes);
    let from = (end.div_ceil(SECTOR)).saturating_sub(sectors) * SECTOR;
    bytes[from..end].fill(0);
    overwrite(disk, &path, &bytes)
}

const SECTOR: usize = 512;

fn written_end(bytes: &[u8]) -> usize {
    bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1)
}

/// Paths of the segments, oldest first, and the index after which each begins.
fn segments(disk: &SimDisk) -> Option<Vec<(String, u64)>> {
    let mut names = disk.list(Path::new(LOG)).ok()?;
    names.retain(|name| name.ends_with(".wal"));
    names.sort();
    let index = |name: &str| u64::from_str_radix(name.strip_suffix(".wal")?.split_once('-')?.1, 16).ok();
    names.into_iter().map(|name| Some((format!("{LOG}/{name}"), index(&name)?))).collect()
}

/// In place, so that it takes no room.
fn overwrite(disk: &SimDisk, path: &str, bytes: &[u8]) -> Option<()> {
    let mut file = disk.open(Path::new(path), Open::Existing).ok()?;
    file.write_at(0, bytes).ok()?;
    file.sync().ok().map(drop)
}
