//! Several cores wired by hand: a network that loses, repeats and reorders, disks that answer late, no threads.

mod distrust;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use bytes::Bytes;
use prost::Message as _;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::sync::oneshot;

use super::{Core, Output, Proposal, ReadRequest, Room, core::Recovered, tests::options};
use crate::{
    actor::Gate,
    apply::{ConfChanged, Error, Outcome, Reply, Response, Ticket},
    cluster::{Change, Member},
    pb::{
        etcdserverpb::{InternalRaftRequest, PutRequest, RequestHeader},
        raftpb,
    },
};

/// One member: its core, its log as its disk has it, and what it has applied.
struct Node {
    core: Core,
    output: Output,
    /// The disk answers only when asked to.
    hangs: bool,
    unanswered: VecDeque<u64>,
    disk: BTreeMap<u64, raftpb::Entry>,
    applied: BTreeMap<u64, Bytes>,
    applied_index: u64,
    acknowledged: Vec<u64>,
}

struct Cluster {
    nodes: BTreeMap<u64, Node>,
    network: Vec<raftpb::Message>,
    /// From, to: nothing arrives.
    cut: BTreeSet<(u64, u64)>,
    /// A snapshot is on its way for ever.
    loses_snapshots: bool,
    gate: Gate,
    now: Instant,
    ids: u64,
    answers: Vec<(u64, oneshot::Receiver<Outcome>)>,
}

fn node(id: u64, voters: &[u64]) -> Node {
    node_of(id, raftpb::ConfState { voters: voters.to_vec(), ..Default::default() })
}

fn node_of(id: u64, conf_state: raftpb::ConfState) -> Node {
    let core = Core::new(options(id), Recovered { conf_state, ..Recovered::default() }).unwrap();
    Node {
        core,
        output: Output::default(),
        hangs: false,
        unanswered: VecDeque::new(),
        disk: BTreeMap::new(),
        applied: BTreeMap::new(),
        applied_index: 0,
        acknowledged: Vec::new(),
    }
}

impl Cluster {
    fn new(n: u64) -> Self {
        let voters: Vec<u64> = (1..=n).collect();
        Self {
            nodes: voters.iter().map(|id| (*id, node(*id, &voters))).collect(),
            network: Vec::new(),
            cut: BTreeSet::new(),
            loses_snapshots: false,
            gate: Gate::new("test", 100_000, 1 << 30),
            now: Instant::now(),
            ids: 0,
            answers: Vec::new(),
        }
    }

    fn led(n: u64) -> (Self, u64) {
        let mut cluster = Self::new(n);
        let leader = cluster.until_led();
        (cluster, leader)
    }

    fn leader(&self) -> Option<u64> {
        let leading = self.nodes.iter().filter(|(_, n)| n.core.reading().is_leader);
        leading.max_by_key(|(_, n)| n.core.reading().term).map(|(id, _)| *id)
    }

    fn until_led(&mut self) -> u64 {
        for _ in 0..100 {
            self.tick();
            self.settle();
            if let Some(leader) = self.leader()
                && self.nodes[&leader].core.reading().commit > 0
            {
                return leader;
            }
        }
        panic!("no leader within 100 ticks");
    }

    fn node(&mut self, id: u64) -> &mut Node {
        self.nodes.get_mut(&id).unwrap()
    }

    fn tick(&mut self) {
        self.now += Duration::from_millis(100);
        for node in self.nodes.values_mut() {
            node.core.tick(self.now);
        }
    }

    fn ticks(&mut self, n: usize) {
        for _ in 0..n {
            self.tick();
            self.settle();
        }
    }

    fn ticket(&mut self, request: InternalRaftRequest) -> (u64, Ticket) {
        self.ids += 1;
        let (reply, answer) = Reply::new(0);
        self.answers.push((self.ids, answer));
        let permit = self.gate.try_enter(1).unwrap();
        let deadline = self.now + Duration::from_secs(7);
        (self.ids, Ticket { request: Box::new(request), reply, deadline, permit })
    }

    fn propose(&mut self, at: u64, key: &str) -> u64 {
        let (id, ticket) = self.ticket(InternalRaftRequest::default());
        let header = Some(RequestHeader { id, ..Default::default() });
        let put = Some(PutRequest { key: key.to_owned().into(), ..Default::default() });
        let data = InternalRaftRequest { header, put, ..Default::default() }.encode_to_vec().into();
        self.node(at).core.propose(Proposal { data, conf_change: false, id, as_leader_of: None, ticket });
        id
    }

    fn change(&mut self, at: u64, change: &Change) -> u64 {
        let (id, ticket) = self.ticket(InternalRaftRequest::default());
        let data = change.encode(id).encode_to_vec().into();
        self.node(at).core.propose(Proposal { data, conf_change: true, id, as_leader_of: None, ticket });
        id
    }

    fn read(&mut self, at: u64) -> oneshot::Receiver<Outcome> {
        let (reply, answer) = Reply::new(0);
        let deadline = self.now + Duration::from_secs(7);
        let permit = self.gate.try_enter(1).unwrap();
        self.node(at).core.read(ReadRequest { reply, deadline, permit });
        answer
    }

    /// One round of a member's work: its disk answers, it applies, its messages go out.
    fn work(&mut self, id: u64) -> bool {
        let Some(node) = self.nodes.get_mut(&id) else { return false };
        node.core.poll(node.applied_index, Room::EVERYWHERE, &mut node.output);
        let mut moved = false;
        for append in node.output.appends.drain(..) {
            if let Some(snapshot) = append.snapshot {
                node.disk.clear();
                assert!(append.hard_state.unwrap().commit >= snapshot.index);
            }
            for entry in append.entries {
                node.disk.split_off(&entry.index.unwrap());
                node.disk.insert(entry.index.unwrap(), entry);
            }
            node.unanswered.push_back(append.number);
        }
        if !node.hangs {
            while let Some(number) = node.unanswered.pop_front() {
                node.core.persisted(number, &mut node.output);
                moved = true;
            }
        }
        if let Some(install) = node.output.install.take() {
            node.applied_index = install.index;
            node.core.installed(install.index);
        }
        for entry in std::mem::take(&mut node.output.committed) {
            moved = true;
            assert_eq!(entry.index, node.applied_index + 1, "applied without gaps");
            node.applied_index = entry.index;
            node.applied.insert(entry.index, entry.data.clone());
            let answer = entry.ticket.map(|t| t.reply);
            if entry.conf_change {
                let change = raftpb::ConfChange::decode(entry.data).unwrap();
                let change = Some((change.r#type(), change.node_id.unwrap()));
                let answer = answer.map(|reply| (reply, Ok(Response::Done)));
                node.core.conf_changed(ConfChanged { index: entry.index, change, answer }, &mut node.output);
            } else if let Some(reply) = answer {
                reply.answer(Ok(Response::Done));
                node.acknowledged.push(entry.index);
            }
        }
        for (reply, outcome) in node.output.answers.drain(..) {
            reply.answer(outcome);
        }
        moved |= !node.output.messages.is_empty();
        self.network.append(&mut node.output.messages);
        moved
    }

    fn deliver(&mut self, mut message: raftpb::Message) {
        let (from, to) = (message.from.unwrap(), message.to.unwrap());
        if self.cut.contains(&(from, to)) || !self.nodes.contains_key(&to) {
            return;
        }
        if message.r#type() == raftpb::MessageType::MsgSnap {
            if self.loses_snapshots {
                return;
            }
            // The database is made when it is sent, and so it may be newer than asked for.
            let leader = &self.nodes[&from];
            let newest = leader.applied_index;
            let term = leader.disk.get(&newest).and_then(|e| e.term);
            let metadata = message.snapshot.as_mut().unwrap().metadata.as_mut().unwrap();
            assert!(metadata.index.unwrap() <= newest);
            if let Some(term) = term {
                (metadata.index, metadata.term) = (Some(newest), Some(term));
            }
            let state = leader.applied.clone();
            let node = self.node(to);
            if metadata.index > Some(node.applied_index) {
                node.applied = state;
            }
            self.node(from).core.snapshot_sent(to, true);
        }
        self.node(to).core.step(message).unwrap();
    }

    /// Everything moves until nothing does.
    fn settle(&mut self) {
        loop {
            let ids: Vec<u64> = self.nodes.keys().copied().collect();
            let moved = ids.into_iter().fold(false, |moved, id| self.work(id) | moved);
            let messages = std::mem::take(&mut self.network);
            if !moved && messages.is_empty() {
                return;
            }
            for message in messages {
                self.deliver(message);
            }
        }
    }

    fn isolate(&mut self, id: u64) {
        for other in self.nodes.keys().filter(|other| **other != id) {
            self.cut.extend([(id, *other), (*other, id)]);
        }
    }

    fn outcome(&mut self, id: u64) -> Option<Outcome> {
        self.answers.iter_mut().find(|(i, _)| *i == id).and_then(|(_, answer)| answer.try_recv().ok())
    }

    /// All logs and all applied states agree where they overlap.
    fn agree(&self) {
        for (a, one) in &self.nodes {
            for (b, two) in &self.nodes {
                for (index, data) in &one.applied {
                    if let Some(other) = two.applied.get(index) {
                        assert_eq!(data, other, "entry {index} of {a} and {b}");
                    }
                }
            }
        }
    }
}

fn other(cluster: &Cluster, than: u64) -> u64 {
    *cluster.nodes.keys().find(|id| **id != than).unwrap()
}

#[test]
fn three_members_elect_one_and_agree() {
    let (mut cluster, leader) = Cluster::led(3);
    let id = cluster.propose(leader, "a");
    cluster.settle();
    assert_eq!(cluster.outcome(id), Some(Ok(Response::Done)));
    cluster.ticks(2);
    assert!(cluster.nodes.values().all(|n| n.applied_index == 2 && n.core.reading().leader == leader));
    cluster.agree();
}

#[test]
fn follower_forwards_and_hears_the_answer() {
    // D-15
    let (mut cluster, leader) = Cluster::led(3);
    let follower = other(&cluster, leader);
    let ids: Vec<u64> = (0..50).map(|i| cluster.propose(follower, &format!("k{i}"))).collect();
    cluster.ticks(2);
    for id in ids {
        assert_eq!(cluster.outcome(id), Some(Ok(Response::Done)));
    }
    assert_eq!(cluster.nodes[&follower].acknowledged.len(), 50);
    assert!(cluster.nodes[&leader].acknowledged.is_empty());
}

#[test]
fn proposals_wait_for_a_leader_and_are_served_by_it() {
    // D-16
    let mut cluster = Cluster::new(3);
    let id = cluster.propose(2, "a");
    cluster.ticks(3);
    assert_eq!(cluster.outcome(id), None);
    cluster.until_led();
    cluster.ticks(2);
    assert_eq!(cluster.outcome(id), Some(Ok(Response::Done)));
}

#[test]
fn proposals_wait_while_the_leader_cannot_be_reached() {
    // A leader that has died is believed in until an election; what went to it until then would be lost.
    let (mut cluster, leader) = Cluster::led(3);
    cluster.isolate(leader);
    let follower = other(&cluster, leader);
    cluster.node(follower).core.unreachable(leader);
    let id = cluster.propose(follower, "a");
    cluster.settle();
    assert_eq!(cluster.nodes[&follower].core.reading().leader, leader);
    cluster.ticks(40);
    assert_ne!(cluster.leader(), Some(leader));
    assert_eq!(cluster.outcome(id), Some(Ok(Response::Done)));

    // One that was out of reach for a moment gets them as soon as it is heard.
    let leader = cluster.leader().unwrap();
    cluster.cut.clear();
    cluster.ticks(5);
    let follower = other(&cluster, leader);
    cluster.node(follower).core.unreachable(leader);
    let id = cluster.propose(follower, "b");
    cluster.settle();
    assert_eq!(cluster.outcome(id), None);
    cluster.ticks(2);
    assert_eq!(cluster.outcome(id), Some(Ok(Response::Done)));
    cluster.agree();
}

#[test]
fn reads_of_any_member_see_what_was_acknowledged() {
    // D-8
    let (mut cluster, leader) = Cluster::led(3);
    let follower = other(&cluster, leader);
    cluster.propose(leader, "a");
    cluster.settle();
    let commit = cluster.nodes[&leader].core.reading().commit;
    for at in [leader, follower] {
        let mut answer = cluster.read(at);
        cluster.settle();
        assert_eq!(answer.try_recv().unwrap(), Ok(Response::ReadIndex(commit)));
    }
}

#[test]
fn deposed_leader_answers_no_read() {
    // D-9, D-18
    let (mut cluster, leader) = Cluster::led(3);
    cluster.isolate(leader);
    let mut answer = cluster.read(leader);
    cluster.ticks(60);
    assert!(answer.try_recv().is_err(), "neither an index nor an error yet");
    assert!(!cluster.nodes[&leader].core.reading().is_leader, "stepped down by itself");
    cluster.ticks(20);
    assert_eq!(answer.try_recv().unwrap(), Err(Error::Timeout));
}

#[test]
fn late_heartbeat_answers_confirm_no_later_read() {
    // D-11, H-17: the same request twice, as a network may do it.
    let (mut cluster, leader) = Cluster::led(3);
    let follower = other(&cluster, leader);
    let third = *cluster.nodes.keys().find(|id| ![leader, follower].contains(id)).unwrap();
    let request = |context: u8| raftpb::Message {
        r#type: Some(raftpb::MessageType::MsgReadIndex.into()),
        to: Some(leader),
        from: Some(follower),
        entries: vec![raftpb::Entry { data: Some(vec![context; 8].into()), ..Default::default() }],
        ..Default::default()
    };
    cluster.deliver(request(7));
    cluster.work(leader);
    // The round is answered by one; the answer of the other is late.
    let mut late = Vec::new();
    for message in std::mem::take(&mut cluster.network) {
        let to = message.to.unwrap();
        cluster.deliver(message);
        cluster.work(to);
        let answers = std::mem::take(&mut cluster.network);
        if to == third { late.extend(answers) } else { answers.into_iter().for_each(|m| cluster.deliver(m)) }
    }
    cluster.work(leader);
    let answered = |cluster: &Cluster| {
        cluster.network.iter().filter(|m| m.r#type() == raftpb::MessageType::MsgReadIndexResp).count()
    };
    assert_eq!(answered(&cluster), 1);
    // Another leader commits something that this one does not know.
    cluster.isolate(leader);
    while cluster.nodes[&third].core.reading().leader == leader || cluster.leader() == Some(leader) {
        cluster.now += Duration::from_millis(100);
        let now = cluster.now;
        for id in [follower, third] {
            cluster.node(id).core.tick(now);
        }
        cluster.settle();
    }
    assert!(cluster.nodes[&leader].core.reading().is_leader, "its clock stands still");
    cluster.propose(follower, "unknown to the old one");
    cluster.settle();
    // A new request, the old one again, and now the late answer.
    cluster.cut.clear();
    for context in [8, 7] {
        cluster.node(leader).core.step(request(context)).unwrap();
        cluster.work(leader);
    }
    cluster.network.clear();
    for message in late {
        cluster.deliver(message);
    }
    cluster.work(leader);
    assert_eq!(answered(&cluster), 0, "what this one knows is too old for them");
}

#[test]
fn membership_changes_keep_their_bytes_in_every_log() {
    // An added learner has a number that means nothing to the crate; an update means nothing to raft.
    let (mut cluster, leader) = Cluster::led(3);
    let follower = other(&cluster, leader);
    let learner = Member { id: 4, peer_urls: vec!["http://h:4".to_owned()], is_learner: true, ..Member::default() };
    // A real log begins with the founding members.
    cluster.nodes.insert(4, node(4, &[1, 2, 3]));
    let changes = [
        (follower, Change::Add(learner)),
        (leader, Change::Update { id: 4, peer_urls: vec!["http://h:5".to_owned()] }),
        (leader, Change::Promote(4)),
        (follower, Change::Remove(4)),
    ];
    for (at, change) in changes {
        let id = cluster.change(at, &change);
        let bytes = Bytes::from(change.encode(id).encode_to_vec());
        cluster.ticks(3);
        assert_eq!(cluster.outcome(id), Some(Ok(Response::Done)));
        for voter in 1..=3 {
            let node = &cluster.nodes[&voter];
            assert_eq!(node.disk.values().last().unwrap().data.as_ref(), Some(&bytes), "{change:?} at {voter}");
            assert_eq!(node.disk.values().last().unwrap().r#type, Some(1));
        }
        match change {
            Change::Add(_) => assert!(cluster.nodes[&4].core.reading().is_learner),
            Change::Promote(_) => assert!(!cluster.nodes[&4].core.reading().is_learner),
            _ => {}
        }
    }
    cluster.agree();
}

#[test]
fn second_change_under_way_is_refused_at_once() {
    // C-27
    let (mut cluster, leader) = Cluster::led(3);
    let add = |id| Change::Add(Member { id, peer_urls: vec![format!("http://h:{id}")], ..Member::default() });
    let (first, second) = (cluster.change(leader, &add(8)), cluster.change(leader, &add(9)));
    cluster.settle();
    assert_eq!(cluster.outcome(second), Some(Err(Error::ProposalDropped)));
    cluster.ticks(2);
    assert_eq!(cluster.outcome(first), Some(Ok(Response::Done)));
}

#[test]
fn second_change_forwarded_while_one_is_under_way_is_a_timeout() {
    // C-27: in the log an empty entry takes its place, and nothing tells a follower whose change that was.
    let (mut cluster, leader) = Cluster::led(3);
    let follower = other(&cluster, leader);
    let add = |id| Change::Add(Member { id, peer_urls: vec![format!("http://h:{id}")], ..Member::default() });
    let (first, second) = (cluster.change(leader, &add(8)), cluster.change(follower, &add(9)));
    cluster.ticks(60);
    assert_eq!(cluster.outcome(first), Some(Ok(Response::Done)));
    assert_eq!(cluster.outcome(second), None, "no success, and its time is not over");
    cluster.ticks(15);
    assert_eq!(cluster.outcome(second), Some(Err(Error::Timeout)));
    let changes = |node: &Node| node.disk.values().filter(|e| e.r#type() == raftpb::EntryType::EntryConfChange).count();
    assert!(cluster.nodes.values().all(|node| changes(node) == 1), "it is in nobody's log");
    // The way is free again.
    let third = cluster.change(follower, &add(9));
    cluster.ticks(3);
    assert_eq!(cluster.outcome(third), Some(Ok(Response::Done)));
}

#[test]
fn leader_that_removes_itself_makes_room() {
    // C-16
    let (mut cluster, leader) = Cluster::led(3);
    let id = cluster.change(leader, &Change::Remove(leader));
    cluster.settle();
    assert_eq!(cluster.outcome(id), Some(Ok(Response::Done)));
    assert!(!cluster.nodes[&leader].core.reading().is_leader);
    cluster.nodes.remove(&leader);
    let next = cluster.until_led();
    let id = cluster.propose(next, "a");
    cluster.ticks(2);
    assert_eq!(cluster.outcome(id), Some(Ok(Response::Done)));
}

#[test]
fn leader_that_is_removed_says_so_until_it_ends() {
    for (members, is_first_lost) in [(2, false), (2, true), (3, false), (3, true)] {
        let (mut cluster, leader) = Cluster::led(members);
        cluster.change(leader, &Change::Remove(leader));
        // All have it in their logs, and nobody hears that it is committed.
        while cluster.node(leader).core.reading().is_leader {
            let all: Vec<u64> = cluster.nodes.keys().copied().filter(|id| *id != leader).chain([leader]).collect();
            for id in all {
                std::mem::take(&mut cluster.network).into_iter().for_each(|message| cluster.deliver(message));
                cluster.work(id);
            }
        }
        cluster.network.clear();
        if is_first_lost {
            cluster.work(leader);
            cluster.network.clear();
            cluster.tick();
        }
        cluster.settle();
        cluster.nodes.remove(&leader);
        let others = cluster.nodes.values().map(|node| node.core.conf_state().voters.len());
        assert!(others.into_iter().all(|voters| voters + 1 == members as usize), "all have heard of it");
        let next = cluster.until_led();
        let id = cluster.propose(next, "a");
        cluster.ticks(2);
        assert_eq!(cluster.outcome(id), Some(Ok(Response::Done)), "{members} members");
    }
}

#[test]
fn the_only_one_left_leads_when_its_log_is_written() {
    let (mut cluster, leader) = Cluster::led(2);
    let left = other(&cluster, leader);
    // The removal is in the log of who stays, and not committed yet; what follows it hangs there.
    cluster.node(leader).hangs = true;
    cluster.change(leader, &Change::Remove(leader));
    cluster.settle();
    cluster.node(left).hangs = true;
    cluster.propose(leader, "behind");
    cluster.settle();
    cluster.node(leader).hangs = false;
    cluster.settle();
    assert!(!cluster.node(leader).core.reading().is_leader, "it is removed");
    cluster.ticks(40);
    assert!(!cluster.node(left).core.reading().is_leader, "its log's disk hangs");

    cluster.node(left).hangs = false;
    cluster.settle();
    cluster.ticks(2);
    assert!(cluster.node(left).core.reading().is_leader);
    let id = cluster.propose(left, "alone");
    cluster.settle();
    assert!(matches!(cluster.outcome(id), Some(Ok(Response::Done))));
    assert!(cluster.nodes[&left].applied.values().any(|data| data.windows(6).any(|at| at == b"behind")));
}

#[test]
fn follower_far_behind_gets_a_snapshot_and_goes_on() {
    // D-26
    let (mut cluster, leader) = Cluster::led(3);
    let follower = other(&cluster, leader);
    cluster.isolate(follower);
    for i in 0..50 {
        cluster.propose(leader, &format!("k{i}"));
        cluster.settle();
    }
    let applied = cluster.nodes[&leader].applied_index;
    let record = cluster.node(leader).core.checkpoint(applied).unwrap();
    cluster.node(leader).core.compact(record.index.unwrap());
    cluster.cut.clear();
    cluster.ticks(5);
    assert_eq!(cluster.nodes[&follower].applied_index, applied);
    assert!(!cluster.nodes[&follower].disk.contains_key(&10), "it came by snapshot");
    let id = cluster.propose(follower, "after");
    cluster.ticks(2);
    assert_eq!(cluster.outcome(id), Some(Ok(Response::Done)));
    cluster.agree();
}

#[test]
fn the_log_is_kept_for_no_member_that_was_removed() {
    let (mut cluster, leader) = Cluster::led(3);
    let follower = other(&cluster, leader);
    cluster.isolate(follower);
    for i in 0..20 {
        cluster.propose(leader, &format!("k{i}"));
        cluster.settle();
    }
    let applied = cluster.nodes[&leader].applied_index;
    let record = cluster.node(leader).core.checkpoint(applied).unwrap();
    cluster.node(leader).core.compact(record.index());
    cluster.cut.clear();
    cluster.loses_snapshots = true;
    cluster.ticks(3);
    for i in 0..20 {
        cluster.propose(leader, &format!("l{i}"));
        cluster.settle();
    }
    let newest = cluster.nodes[&leader].applied_index;
    let kept = cluster.node(leader).core.checkpoint(newest).map_or(0, |record| record.index());
    assert!(kept <= applied, "what follows the snapshot is kept: {kept}");
    cluster.change(leader, &Change::Remove(follower));
    cluster.ticks(3);
    let newest = cluster.nodes[&leader].applied_index;
    let kept = cluster.node(leader).core.checkpoint(newest).map_or(0, |record| record.index());
    assert!(kept > applied, "kept from {kept} of {newest}");
}

#[test]
fn leadership_is_handed_over_and_nothing_is_lost_on_the_way() {
    // M-40, C-44
    let (mut cluster, leader) = Cluster::led(3);
    let follower = other(&cluster, leader);
    cluster.node(leader).core.transfer(follower);
    let ids = [cluster.propose(leader, "a"), cluster.propose(follower, "b")];
    cluster.settle();
    cluster.ticks(1);
    assert_eq!(cluster.leader(), Some(follower));
    cluster.ticks(2);
    for id in ids {
        assert_eq!(cluster.outcome(id), Some(Ok(Response::Done)));
    }
}

#[test]
fn leader_whose_disk_hangs_steps_down_and_acknowledges_nothing() {
    let (mut cluster, leader) = Cluster::led(3);
    cluster.node(leader).hangs = true;
    let id = cluster.propose(leader, "a");
    cluster.ticks(12);
    assert!(!cluster.nodes[&leader].core.reading().is_leader);
    let next = (0..40).find_map(|_| {
        cluster.ticks(1);
        cluster.leader()
    });
    assert!(next.is_some_and(|next| next != leader));
    assert_ne!(cluster.outcome(id), Some(Err(Error::ProposalDropped)));
    // The disk is back: it follows.
    cluster.node(leader).hangs = false;
    cluster.ticks(5);
    let id = cluster.propose(leader, "b");
    cluster.ticks(3);
    assert_eq!(cluster.outcome(id), Some(Ok(Response::Done)));
    cluster.agree();
}

#[test]
fn a_sole_voter_says_nothing_before_its_vote_is_written() {
    // After a crash it would lead in the same term again, and give its learner other entries at the same places.
    let mut cluster = Cluster::new(1);
    let members = raftpb::ConfState { voters: vec![1], learners: vec![2], ..Default::default() };
    cluster.nodes = [1, 2].map(|id| (id, node_of(id, members.clone()))).into();
    cluster.node(1).hangs = true;
    cluster.ticks(50);
    assert!(cluster.nodes[&1].core.reading().is_leader);
    assert_eq!(cluster.nodes[&2].core.reading().term, 0, "the learner has heard of it");
    cluster.node(1).hangs = false;
    cluster.ticks(5);
    assert_eq!(cluster.nodes[&2].applied_index, 1);
    cluster.agree();
}

#[test]
fn returning_member_forces_no_election() {
    // D-19
    let (mut cluster, leader) = Cluster::led(3);
    let follower = other(&cluster, leader);
    let term = cluster.nodes[&leader].core.reading().term;
    cluster.isolate(follower);
    cluster.ticks(100);
    cluster.cut.clear();
    cluster.ticks(20);
    assert_eq!(cluster.leader(), Some(leader));
    assert_eq!(cluster.nodes[&leader].core.reading().term, term);
}

/// Random loss, repetition, reordering, cuts, hanging disks, changes of leader, reads and writes at every member.
fn bad_day(seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    let n = rng.random_range(3..=5);
    let mut cluster = Cluster::new(n);
    let mut acknowledged = 0;
    let mut reads: Vec<(u64, oneshot::Receiver<Outcome>)> = Vec::new();
    for step in 0..1500 {
        let at = rng.random_range(1..=n);
        match rng.random_range(0..100) {
            0..20 => {
                cluster.propose(at, &format!("k{step}"));
            }
            20..30 => {
                let answer = cluster.read(at);
                reads.push((acknowledged, answer));
            }
            30..32 => cluster.isolate(at),
            32..34 => cluster.cut.clear(),
            34 => cluster.node(at).hangs = true,
            35..38 => cluster.node(at).hangs = false,
            38 => {
                let to = rng.random_range(1..=n);
                cluster.node(at).core.transfer(to);
            }
            39 => {
                let node = cluster.node(at);
                if let Some(record) = node.core.checkpoint(node.applied_index) {
                    node.core.compact(record.index.unwrap());
                }
            }
            40..50 => cluster.tick(),
            50..75 => {
                cluster.work(at);
            }
            _ => {
                for _ in 0..rng.random_range(1..10) {
                    if cluster.network.is_empty() {
                        break;
                    }
                    let which = rng.random_range(0..cluster.network.len());
                    let message = cluster.network.swap_remove(which);
                    // A snapshot is a post: delivered whole and once, or reported lost.
                    let copy = message.r#type() != raftpb::MessageType::MsgSnap && rng.random_bool(0.05);
                    if copy {
                        cluster.network.push(message.clone());
                    }
                    if rng.random_bool(0.9) {
                        cluster.deliver(message);
                    } else if message.r#type() == raftpb::MessageType::MsgSnap {
                        let (from, to) = (message.from.unwrap(), message.to.unwrap());
                        cluster.node(from).core.snapshot_sent(to, false);
                    }
                }
            }
        }
        let newest = cluster.nodes.values().flat_map(|n| n.acknowledged.last()).max();
        acknowledged = acknowledged.max(newest.copied().unwrap_or(0));
        reads.retain_mut(|(least, answer)| match answer.try_recv() {
            Ok(Ok(Response::ReadIndex(index))) => {
                assert!(index >= *least, "seed {seed}: a read at {index} began after {least} was acknowledged");
                false
            }
            Ok(_) => false,
            Err(_) => true,
        });
    }
    cluster.agree();
    // After the faults it heals.
    cluster.cut.clear();
    for node in cluster.nodes.values_mut() {
        node.hangs = false;
    }
    cluster.settle();
    cluster.ticks(60);
    let leader = cluster.until_led();
    let id = cluster.propose(leader, "healed");
    cluster.ticks(20);
    assert_eq!(cluster.outcome(id), Some(Ok(Response::Done)), "seed {seed}");
    let indexes: BTreeSet<u64> = cluster.nodes.values().map(|n| n.applied_index).collect();
    assert_eq!(indexes.len(), 1, "seed {seed}: all have caught up: {indexes:?}");
    cluster.agree();
}

#[test]
fn bad_days_end_well() {
    let (first, count) = match std::env::var("RAFT_SEED") {
        Ok(seed) => (seed.parse().unwrap(), 1),
        Err(_) => (0, 60),
    };
    for seed in first..first + count {
        bad_day(seed);
    }
}

#[test]
fn a_slow_applier_costs_the_leader_nothing_but_proposals() {
    let (mut cluster, leader) = Cluster::led(3);
    let term = cluster.nodes[&leader].core.reading().term;
    cluster.propose(leader, "a");
    // Its applier has no room from now on.
    for _ in 0..40 {
        cluster.tick();
        let node = cluster.node(leader);
        let applied = node.applied_index;
        node.core.poll(applied, Room { log: true, apply: false }, &mut node.output);
        let moved: Vec<_> = node.output.appends.drain(..).map(|append| append.number).collect();
        for number in moved {
            node.core.persisted(number, &mut node.output);
        }
        assert!(node.output.committed.is_empty(), "apply is given nothing");
        let messages = std::mem::take(&mut node.output.messages);
        messages.into_iter().for_each(|message| cluster.deliver(message));
        for id in cluster.nodes.keys().copied().filter(|id| *id != leader).collect::<Vec<_>>() {
            cluster.work(id);
        }
        let messages = std::mem::take(&mut cluster.network);
        messages.into_iter().for_each(|message| cluster.deliver(message));
    }
    let now = cluster.nodes[&leader].core.reading();
    assert!(now.is_leader && now.term == term, "heartbeats went on");
    cluster.ticks(3);
    let applied: BTreeSet<u64> = cluster.nodes.values().map(|node| node.applied_index).collect();
    assert_eq!(applied.len(), 1, "and everything is made up for: {applied:?}");
}

#[test]
fn an_id_that_comes_twice_answers_nobody_for_another_entry() {
    let (mut cluster, leader) = Cluster::led(3);
    let follower = other(&cluster, leader);
    // A clock was set back: two requests have one id. The follower's never reaches the leader.
    cluster.cut.insert((follower, leader));
    let id = cluster.propose(follower, "mine");
    cluster.settle();
    cluster.ids -= 1;
    assert_eq!(cluster.propose(leader, "theirs"), id);
    cluster.cut.clear();
    cluster.ticks(3);
    let node = &cluster.nodes[&follower];
    assert!(node.applied.values().any(|data| data.windows(6).any(|text| text == b"theirs")));
    assert!(node.acknowledged.is_empty(), "the follower took another's entry for its own");
}

#[test]
fn the_entry_of_a_membership_change_stays_until_it_is_in_force() {
    let mut cluster = Cluster::new(3);
    for (id, node) in &mut cluster.nodes {
        let mut options = options(*id);
        options.catch_up_entries = 0;
        let conf_state = raftpb::ConfState { voters: vec![1, 2, 3], ..Default::default() };
        node.core = Core::new(options, Recovered { conf_state, ..Recovered::default() }).unwrap();
    }
    let leader = cluster.until_led();
    let learner = Member { id: 4, peer_urls: vec!["http://h:4".to_owned()], is_learner: true, ..Member::default() };
    cluster.change(leader, &Change::Add(learner));
    // As `settle`, but apply's word that the change is recorded is still on its way.
    let mut recorded = None;
    for _ in 0..10 {
        for id in cluster.nodes.keys().copied().collect::<Vec<_>>() {
            if id != leader {
                cluster.work(id);
                continue;
            }
            let node = cluster.node(leader);
            node.core.poll(node.applied_index, Room::EVERYWHERE, &mut node.output);
            let written: Vec<u64> = node.output.appends.drain(..).map(|append| append.number).collect();
            written.into_iter().for_each(|number| node.core.persisted(number, &mut node.output));
            recorded = recorded.or(node.output.committed.drain(..).map(|entry| entry.index).last());
            let messages = std::mem::take(&mut node.output.messages);
            cluster.network.extend(messages);
        }
        let messages = std::mem::take(&mut cluster.network);
        messages.into_iter().for_each(|message| cluster.deliver(message));
    }
    let recorded = recorded.expect("the change was handed to apply");
    let node = cluster.node(leader);
    let record = node.core.checkpoint(recorded);
    assert!(record.is_none_or(|record| record.index() < recorded), "its entry would be dropped");
}

#[test]
fn a_member_that_takes_on_a_snapshot_stands_for_no_election() {
    let (mut cluster, leader) = Cluster::led(3);
    let follower = other(&cluster, leader);
    for i in 0..20 {
        cluster.propose(leader, &format!("k{i}"));
        cluster.settle();
    }
    let term = cluster.nodes[&leader].core.reading().term;
    let conf_state = raftpb::ConfState { voters: vec![1, 2, 3], ..Default::default() };
    let metadata = raftpb::SnapshotMetadata { conf_state: Some(conf_state), index: Some(1_000), term: Some(term) };
    let message = |kind: raftpb::MessageType, snapshot| raftpb::Message {
        r#type: Some(kind.into()),
        to: Some(follower),
        from: Some(leader),
        term: Some(term),
        snapshot,
        ..Default::default()
    };
    let snapshot = raftpb::Snapshot { data: Some(Bytes::new()), metadata: Some(metadata) };
    let now = cluster.now;
    let node = cluster.node(follower);
    node.core.step(message(raftpb::MessageType::MsgSnap, Some(snapshot))).unwrap();
    assert!(node.core.has_snapshot());
    let applied = node.applied_index;
    node.core.poll(applied, Room::EVERYWHERE, &mut node.output);
    // Its log writes the record, its applier takes long, and the leader is gone.
    for tick in 0..100 {
        node.core.tick(now + Duration::from_millis(100 * tick));
        node.core.step(message(raftpb::MessageType::MsgTimeoutNow, None)).unwrap();
        node.core.poll(applied, Room::EVERYWHERE, &mut node.output);
        let written: Vec<u64> = node.output.appends.drain(..).map(|append| append.number).collect();
        written.into_iter().for_each(|number| node.core.persisted(number, &mut node.output));
    }
    assert_eq!(node.core.reading().term, term);
    assert_eq!(node.output.install.map(|install| install.index), Some(1_000));
    node.core.installed(1_000);
    for tick in 100..150 {
        node.core.tick(now + Duration::from_millis(100 * tick));
        node.core.poll(1_000, Room::EVERYWHERE, &mut node.output);
    }
    let asks = |m: &raftpb::Message| m.r#type() == raftpb::MessageType::MsgPreVote;
    assert!(node.output.messages.iter().any(asks), "then it does");
}
