//! The core driven by hand: a lone member's log, without threads and files.

use std::time::{Duration, Instant};

use bytes::Bytes;

use super::{Append, Core, Options, Output, Proposal, Room, core::Recovered};
use crate::{
    actor::Gate,
    apply::{ConfChanged, Error, Reply, Ticket},
    cluster::bootstrap::InitialCluster,
    pb::{etcdserverpb::InternalRaftRequest, raftpb},
};

struct Bench {
    core: Core,
    output: Output,
    applied: u64,
    gate: Gate,
    now: Instant,
    ids: u64,
}

/// Settings of the tests here and of those with several members.
pub(super) fn options(id: u64) -> Options {
    Options {
        id,
        election_ticks: 10,
        heartbeat_ticks: 1,
        pre_vote: true,
        apply_lag_max: 5_000,
        revoke_lag_max: 5_002,
        catch_up_entries: 5,
        catch_up_bytes: 1 << 20,
        // Small ids must not give members like fates.
        seed: id.wrapping_mul(0x1234_5678_9abc_def1),
    }
}

fn founding() -> (u64, Vec<raftpb::Entry>, raftpb::HardState) {
    let cluster = InitialCluster::parse("a=http://127.0.0.1:1", |url| Ok(url.to_owned())).unwrap().found("t");
    (cluster.member_id("a").unwrap(), cluster.entries(), cluster.hard_state())
}

impl Bench {
    fn new() -> Self {
        let (id, entries, hard_state) = founding();
        Self::with(Core::new(options(id), Recovered { entries, hard_state, ..Recovered::default() }).unwrap(), 0)
    }

    fn with(core: Core, applied: u64) -> Self {
        Self {
            core,
            output: Output::default(),
            applied,
            gate: Gate::new("test", 100_000, 1 << 30),
            now: Instant::now(),
            ids: 0,
        }
    }

    fn poll(&mut self) {
        self.core.poll(self.applied, Room::EVERYWHERE, &mut self.output);
    }

    fn propose(&mut self, data: &'static [u8]) {
        self.propose_until(data, self.now + Duration::from_secs(7));
    }

    fn propose_until(&mut self, data: &'static [u8], deadline: Instant) {
        self.propose_request(InternalRaftRequest::default(), data, deadline);
    }

    fn propose_request(&mut self, request: InternalRaftRequest, data: &'static [u8], deadline: Instant) {
        self.ids += 1;
        let (reply, _) = Reply::new(0);
        let permit = self.gate.try_enter(data.len()).unwrap();
        let ticket = Ticket { request: Box::new(request), reply, deadline, permit };
        self.core.propose(Proposal {
            data: Bytes::from_static(data),
            conf_change: false,
            id: self.ids,
            as_leader_of: None,
            ticket,
        });
    }

    fn persist(&mut self, number: u64) {
        self.core.persisted(number, &mut self.output);
        self.poll();
    }

    /// Indexes and data handed to apply since the last call.
    fn committed(&mut self) -> Vec<(u64, Bytes)> {
        self.output.committed.drain(..).map(|c| (c.index, c.data)).collect()
    }

    fn errors(&mut self) -> Vec<Error> {
        self.output.answers.drain(..).map(|(_, outcome)| outcome.unwrap_err()).collect()
    }

    fn conf_changed(&mut self, index: u64) {
        let (id, ..) = founding();
        let change = Some((raftpb::ConfChangeType::ConfChangeAddNode, id));
        self.core.conf_changed(ConfChanged { index, change, answer: None }, &mut self.output);
        self.applied = index;
        self.poll();
    }

    /// Writes whatever is asked for and applies it, until nothing is left.
    fn settle(&mut self) {
        self.poll();
        loop {
            let numbers: Vec<u64> = self.output.appends.drain(..).map(|a: Append| a.number).collect();
            let Some(last) = numbers.last() else { break };
            self.persist(*last);
        }
        if let Some(last) = self.output.committed.drain(..).last() {
            self.applied = last.index;
        }
    }

    fn leading() -> Self {
        let mut bench = Self::new();
        bench.poll();
        bench.committed();
        bench.conf_changed(1);
        bench.settle();
        assert!(bench.core.reading().is_leader);
        bench
    }
}

#[test]
fn founding_log_comes_up_and_its_only_member_leads_at_once() {
    let mut bench = Bench::new();
    bench.poll();
    assert_eq!(bench.output.committed.len(), 1);
    assert!(bench.output.committed[0].conf_change);
    assert!(!bench.core.reading().is_leader, "not before the change is in force");
    bench.committed();
    bench.conf_changed(1);
    bench.settle();
    let now = bench.core.reading();
    assert!(now.is_leader && now.is_alone);
    assert_eq!((now.term, now.commit), (2, 2), "the first entry of its term is committed");
}

#[test]
fn nothing_reaches_apply_before_the_log_is_durable() {
    // H-2
    let mut bench = Bench::leading();
    bench.propose(b"a");
    bench.poll();
    let append = bench.output.appends.pop().unwrap();
    assert!(append.sync && append.entries.len() == 1);
    bench.poll();
    assert!(bench.committed().is_empty());
    bench.persist(append.number);
    assert_eq!(bench.committed(), [(3, Bytes::from_static(b"a"))]);
}

#[test]
fn appends_go_out_while_earlier_ones_are_being_written() {
    let mut bench = Bench::leading();
    let mut numbers = Vec::new();
    for data in [b"a", b"b", b"c"] {
        bench.propose(data);
        bench.poll();
        numbers.push(bench.output.appends.pop().unwrap().number);
    }
    bench.persist(numbers[1]);
    assert_eq!(bench.committed().iter().map(|c| c.0).collect::<Vec<_>>(), [3, 4], "a later answer covers the earlier");
    bench.persist(numbers[2]);
    assert_eq!(bench.committed(), [(5, Bytes::from_static(b"c"))]);
}

#[test]
fn proposals_of_one_turn_share_one_append() {
    let mut bench = Bench::leading();
    for _ in 0..100 {
        bench.propose(b"x");
    }
    bench.poll();
    assert_eq!(bench.output.appends.len(), 1);
    assert_eq!(bench.output.appends[0].entries.len(), 100);
}

#[test]
fn no_ready_is_taken_without_room() {
    let mut bench = Bench::leading();
    bench.propose(b"x");
    bench.core.poll(bench.applied, Room { log: false, apply: true }, &mut bench.output);
    assert!(bench.output.appends.is_empty());
    bench.poll();
    assert_eq!(bench.output.appends.len(), 1);
}

#[test]
fn late_proposals_are_told_what_may_have_happened() {
    // D-16: not handed to raft, so nothing was done.
    let mut bench = Bench::new();
    bench.propose_until(b"queued", bench.now + Duration::from_secs(1));
    bench.core.tick(bench.now + Duration::from_secs(2));
    bench.poll();
    assert_eq!(bench.errors(), [Error::DeadlineExceeded]);
    // D-17: in the log, so it may still take effect.
    let mut bench = Bench::leading();
    bench.propose_until(b"in the log", bench.now + Duration::from_secs(1));
    bench.poll();
    bench.core.tick(bench.now + Duration::from_secs(2));
    bench.poll();
    assert_eq!(bench.errors(), [Error::Timeout]);
    bench.settle();
    assert_eq!(bench.applied, 3, "it does");
}

#[test]
fn proposals_are_refused_when_apply_lags_too_far() {
    // G-12
    let mut bench = Bench::leading();
    for _ in 0..5_001 {
        bench.propose(b"x");
    }
    bench.settle();
    bench.applied = 2;
    bench.propose(b"one too many");
    bench.poll();
    assert_eq!(bench.errors(), [Error::TooManyRequests]);
    // What makes room is let through a little longer.
    for (applied, is_refused) in [(1, false), (0, true)] {
        bench.applied = applied;
        let revoke = InternalRaftRequest { lease_revoke: Some(Default::default()), ..Default::default() };
        bench.propose_request(revoke, b"revoke", bench.now + Duration::from_secs(7));
        bench.poll();
        assert_eq!(!bench.errors().is_empty(), is_refused, "{applied} applied");
    }
    bench.applied = 3;
    bench.propose(b"again");
    bench.poll();
    assert!(bench.errors().is_empty());
}

#[test]
fn stop_refuses_what_waits_and_what_comes() {
    let mut bench = Bench::leading();
    bench.propose(b"in the log");
    bench.poll();
    bench.core.stop();
    bench.propose(b"too late");
    bench.poll();
    assert_eq!(bench.errors(), [Error::Stopped, Error::Stopped]);
}

#[test]
fn commit_index_is_written_with_what_comes_next_or_at_a_checkpoint() {
    let mut bench = Bench::leading();
    let commits = |bench: &mut Bench| {
        let appends: Vec<Append> = bench.output.appends.drain(..).collect();
        let commit = |append: &Append| append.hard_state.as_ref().map(raftpb::HardState::commit);
        let numbers: Vec<u64> = appends.iter().map(|append| append.number).collect();
        (
            numbers.last().copied(),
            appends.iter().map(|append| (append.entries.len(), commit(append))).collect::<Vec<_>>(),
        )
    };
    bench.settle();
    let last = bench.applied;
    bench.propose(b"a");
    bench.poll();
    let (number, writes) = commits(&mut bench);
    assert_eq!(writes, [(1, Some(last))], "the commit before rides along");
    bench.persist(number.unwrap());
    assert_eq!(bench.committed().len(), 1);
    assert_eq!(commits(&mut bench), (None, vec![]), "a commit alone writes nothing");

    bench.core.checkpoint(last + 1);
    bench.poll();
    assert_eq!(commits(&mut bench).1, [], "nothing to drop, nothing to write");
    for _ in 0..20 {
        bench.propose(b"x");
        bench.settle();
    }
    assert!(bench.core.checkpoint(bench.applied).is_some());
    bench.poll();
    assert_eq!(commits(&mut bench).1, [(0, Some(bench.applied))]);
}

#[test]
fn restart_commits_what_the_store_has_applied() {
    let (id, mut entries, _) = founding();
    for index in 2..=6 {
        let data = Some(Bytes::from_static(b"x"));
        entries.push(raftpb::Entry { term: Some(2), index: Some(index), data, ..Default::default() });
    }
    // The commit record lags: it is never synced for its own sake.
    let hard_state = raftpb::HardState { term: Some(2), vote: Some(id), commit: Some(3) };
    let conf_state = raftpb::ConfState { voters: vec![id], ..Default::default() };
    let recovered = Recovered { entries, hard_state, conf_state, applied: 5, ..Recovered::default() };
    let mut bench = Bench::with(Core::new(options(id), recovered).unwrap(), 5);
    bench.core.campaign_alone();
    bench.poll();
    let numbers: Vec<u64> = bench.output.appends.drain(..).map(|a| a.number).collect();
    bench.persist(*numbers.last().unwrap());
    let committed: Vec<u64> = bench.committed().iter().map(|c| c.0).collect();
    assert_eq!(committed, [6, 7], "only what is not applied yet, and the new leader's own entry");
}

#[test]
fn checkpoint_keeps_entries_for_followers_and_forgets_the_rest() {
    let mut bench = Bench::leading();
    for _ in 0..20 {
        bench.propose(b"x");
        bench.settle();
    }
    let record = bench.core.checkpoint(bench.applied).unwrap();
    assert_eq!(record.index, Some(bench.applied - 5));
    assert_eq!(record.conf_state.unwrap().voters.len(), 1);
    let before = bench.core.log_bytes();
    bench.core.compact(bench.applied - 5);
    assert!(bench.core.log_bytes() < before);
    assert!(bench.core.checkpoint(bench.applied).is_none(), "nothing more to drop");
}
