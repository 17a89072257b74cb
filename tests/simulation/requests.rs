//! What members do with requests: proposals, reads, leases and their keepalives, and who is told what became of them.

use std::{collections::BTreeMap, sync::atomic::Ordering, time::Duration};

use actd::{
    apply::{Error, LeaseNotice, Outcome, Reply, Response, Ticket},
    cluster::{Change, Members},
    lease::actor::{Ask, Control, Renewed},
    mvcc::range,
    pb::etcdserverpb::{
        InternalRaftRequest, LeaseCheckpoint, LeaseCheckpointRequest, LeaseRevokeRequest, RangeRequest, RequestHeader,
    },
    raft::{Input, Proposal, ReadRequest},
};
use bytes::Bytes;
use prost::Message as _;
use tokio::sync::oneshot::{self, error::TryRecvError};

use super::{
    client::Kind,
    member::{LeaseAsk, Process, Renewal, Renewing, Waiter},
    plan::{ELECTION, LATE, MS, REQUEST_TIMEOUT, SECOND},
    world::{Answer, Event, OpId, World},
};

/// How much longer than promised a lease may live while all is calm: deadlines are looked at every 50 ms, then a round
/// confirms the leader, and the revocation goes the way of a write.
const OVERDUE: u64 = 2 * SECOND;

/// Since when all voters follow one leader.
pub struct Quiet {
    term: u64,
    members: Members,
    since: u64,
    /// When the time of each lease began anew at the latest.
    begun: BTreeMap<i64, u64>,
}

/// How a keepalive goes on.
enum Step {
    Goes(Renewing),
    Waits(Renewing),
    Done(i64),
}

impl World {
    // Leases

    /// As `lessor::follow_leadership`: the expirer is told when this member leads and has applied what was before.
    pub fn follow_leadership(&mut self, m: usize) {
        let id = self.members[m].id;
        let process = self.process(m);
        let now = process.reading();
        if let Some((term, is_told)) = process.led
            && (!now.is_leader || now.term != term)
        {
            process.led = None;
            if is_told {
                process.lease_tx.control(Control::Demoted);
            }
            self.say(|| format!("m{m} leads no more"));
        }
        if now.is_leader {
            let process = self.process(m);
            let applied_term = process.view.load().applied_term;
            let (term, is_told) = *process.led.get_or_insert((now.term, false));
            if !is_told && applied_term >= term {
                process.led = Some((term, true));
                process.lease_tx.control(Control::Leader { term });
                self.say(|| format!("m{m} leads in term {term}"));
            }
            self.truth.leads(id, now.term);
        }
    }

    /// As `lessor::tick`, and a look at the keepalives that wait.
    pub fn lease_tick(&mut self, m: usize, epoch: u64) {
        let instant = self.instant();
        let process = self.process(m);
        let elapsed = instant.saturating_duration_since(process.started).as_millis() as u64;
        if process.next_deadline.load(Ordering::Relaxed) <= elapsed {
            process.lease_tx.control(Control::Tick);
        }
        self.check_overdue(m);
        self.after(50 * MS, Event::LeaseTick(m, epoch));
    }

    /// What the expirer wants in the log.
    pub fn lease_ask(&mut self, m: usize, ask: LeaseAsk) {
        match ask {
            LeaseAsk::Revoke { id, term } => {
                let request =
                    InternalRaftRequest { lease_revoke: Some(LeaseRevokeRequest { id }), ..Default::default() };
                let (answer, _) = self.propose(m, request, Some(term));
                self.say(|| format!("m{m} revokes lease {id}, which ran out"));
                self.given_up.insert(id, self.now);
                if let Some(answer) = answer {
                    self.process(m).revocations.push((id, answer));
                }
            }
            LeaseAsk::Checkpoint { checkpoints, term } => {
                let lease_checkpoint = Some(LeaseCheckpointRequest { checkpoints });
                self.propose(m, InternalRaftRequest { lease_checkpoint, ..Default::default() }, Some(term));
                self.mark("lease checkpoint");
            }
        }
    }

    /// New revocations in the log: one by a leader's clock must not come before a promise has ended.
    pub fn revoked(&mut self) {
        while let Some(&(lease, request, term)) = self.truth.revoked.get(self.revocations_seen) {
            self.revocations_seen += 1;
            if self.requests.contains_key(&request) {
                continue;
            }
            self.expired.insert(lease, (self.now, term));
            self.mark("lease ran out");
            for (promised_in, until) in self.promised.get(&lease).cloned().unwrap_or_default() {
                self.check_promise(lease, until, promised_in);
            }
        }
    }

    /// A lease that has run out did not do so before a promise had ended. A leader counts its own by its own clock; only the
    /// ones of other leaders may end a little early.
    fn check_promise(&self, lease: i64, until: u64, promised_in: u64) {
        if let Some(&(at, term)) = self.expired.get(&lease) {
            let grace = if promised_in == term { 0 } else { self.grace() };
            assert!(
                at + grace >= until,
                "lease {lease} ran out at {at} µs in term {term}, but was promised until {until} µs in term {promised_in}"
            );
        }
    }

    /// A leader that others have replaced promises until it notices, two election timeouts at most; its successor adds one to
    /// every lease, after the one it took to be elected. What is on its way meanwhile comes on top, and what their clocks
    /// differ by, as in etcd. A handover that was asked for puts the look at the others off by one timeout more.
    fn grace(&self) -> u64 {
        let late = if self.plan.config.late > 0.0 { LATE.1 } else { 0 };
        let clocks = 3 * ELECTION / 10;
        let is_handed_over = self.handed_over > 0 && self.now < self.handed_over + 8 * SECOND;
        let handover = if is_handed_over { 11 * ELECTION / 10 } else { 0 };
        late + 3 * self.plan.config.latency.1 + clocks + handover
    }

    /// While all is calm no lease outlives what was promised last (L-17): looked at wherever one leads whom all voters follow.
    /// What went on before has a lease begin anew when that was first seen, and end an election timeout later (L-25).
    fn check_overdue(&mut self, m: usize) {
        let Some((term, true)) = self.process(m).led else { return };
        let (id, now) = (self.members[m].id, self.now);
        let (members, leases) = (self.process(m).members(), self.process(m).view.load().leases.clone());
        let follows = |id: u64, leader: u64| {
            let Some(m) = self.index_of(id).filter(|m| self.is_awake(*m)) else { return false };
            let reading = self.members[m].process.as_ref().expect("it is up").reading();
            reading.leader == leader && reading.term == term
        };
        // By then what was under way when the faults ended is done: late messages, slow disks, handovers.
        let is_calm = self.is_calm && now >= self.plan.until + 3 * SECOND;
        let is_calm = is_calm && members.iter().all(|member| member.is_learner || follows(member.id, id));
        let quiet = self.quiet.take_if(|quiet| quiet.term == term && quiet.members.is_same(&members));
        if !is_calm {
            return;
        }
        let mut quiet = quiet.unwrap_or_else(|| {
            let begun = leases.ids().map(|lease| (lease, now + ELECTION)).collect();
            Quiet { term, members, since: now, begun }
        });
        quiet.begun.retain(|lease, _| leases.contains(*lease));
        for (lease, ttl, _) in leases.iter() {
            let mut end = *quiet.begun.entry(lease).or_insert(now) + ttl as u64 * SECOND;
            // A revocation that was lost before is tried again.
            if let Some(asked) = self.given_up.get(&lease)
                && *asked <= quiet.since
            {
                end = end.max(asked + REQUEST_TIMEOUT);
            }
            let late = now.saturating_sub(end);
            assert!(late <= OVERDUE, "lease {lease} was promised until {end} µs and lives {late} µs longer");
        }
        self.quiet = Some(quiet);
    }

    /// Somebody was told that a lease lives for `ttl` seconds, in a call that began at `start`, by the leader of `term`.
    pub fn promise(&mut self, lease: i64, start: u64, ttl: i64, term: u64) {
        let until = start + ttl as u64 * SECOND;
        self.check_promise(lease, until, term);
        let promised = self.promised.entry(lease).or_default().entry(term).or_default();
        *promised = (*promised).max(until);
    }

    /// A keepalive at the member where its client is, or at the leader that it was forwarded to.
    pub fn renew(&mut self, m: usize, op: OpId) {
        let deadline = self.now + REQUEST_TIMEOUT;
        let process = self.process(m);
        if !process.renewals.iter().any(|renewal| renewal.op == op) {
            process.renewals.push(Renewal { op, deadline, step: Renewing::At(0) });
        }
    }

    /// Keepalives go on as far as they can.
    fn advance_renewals(&mut self, m: usize) {
        for renewal in std::mem::take(&mut self.process(m).renewals) {
            let Renewal { op, deadline, mut step } = renewal;
            if self.ops[op].done {
                continue;
            }
            loop {
                step = match self.advance(m, op, deadline, step) {
                    Ok(Step::Goes(next)) => next,
                    Ok(Step::Waits(step)) => break self.process(m).renewals.push(Renewal { op, deadline, step }),
                    Ok(Step::Done(ttl)) => break self.respond(op, Answer::Renewed(Ok(ttl))),
                    Err(e) => break self.respond(op, Answer::Renewed(Err(e))),
                }
            }
        }
    }

    /// The next step of a keepalive, as `Server::renew` and those who call it go.
    fn advance(&mut self, m: usize, op: OpId, deadline: u64, step: Renewing) -> Result<Step, Error> {
        let (now, instant) = (self.now, self.instant());
        let again = || Ok(Step::Waits(Renewing::At(now + 50 * MS)));
        let Kind::Renew(lease) = self.ops[op].kind else { unreachable!("only keepalives are renewed") };
        let process = self.process(m);
        let raft = process.reading();
        if now >= deadline {
            return Err(if raft.leader == 0 { Error::NoLeader } else { Error::Timeout });
        }
        let gate = process.reads.clone();
        let alive = |process: &Process, ttl| if process.view.load().leases.contains(lease) { ttl } else { 0 };
        // Who was confirmed goes on with what the expirer said.
        let go_on = |world: &mut World, renewed, is_applied: bool| {
            let Renewed::Ttl { ttl, clear_checkpoint } = renewed else {
                return match renewed {
                    Renewed::Unknown if alive(world.process(m), 1) == 1 => again(),
                    Renewed::Unknown if !is_applied => Err(Error::TimeoutAppliedIndex),
                    _ => Ok(Step::Done(0)),
                };
            };
            if !clear_checkpoint {
                return Ok(Step::Done(alive(world.process(m), ttl)));
            }
            let checkpoints = vec![LeaseCheckpoint { id: lease, remaining_ttl: 0 }];
            let lease_checkpoint = Some(LeaseCheckpointRequest { checkpoints });
            let request = InternalRaftRequest { lease_checkpoint, ..Default::default() };
            match world.propose(m, request, None).0 {
                Some(answer) => Ok(Step::Goes(Renewing::Clears { answer, ttl })),
                None => again(),
            }
        };
        match step {
            Renewing::At(at) if now < at => Ok(Step::Waits(Renewing::At(at))),
            Renewing::At(_) if raft.is_leader => {
                Ok(Step::Goes(Renewing::Applies { commit: raft.commit, until: now + SECOND }))
            }
            Renewing::At(_) => {
                let Some(leader) = self.index_of(raft.leader).filter(|_| self.ops[op].member == m) else {
                    return again();
                };
                if !self.is_cut(m, leader) && !self.is_cut(leader, m) {
                    let latency = self.draw(self.plan.config.latency);
                    self.after(latency, Event::Forwarded(leader, op));
                }
                Ok(Step::Waits(Renewing::At(now + 500 * MS)))
            }
            Renewing::Applies { commit, until } => {
                let is_applied = process.applied() >= commit;
                if !is_applied && now < until {
                    return Ok(Step::Waits(Renewing::Applies { commit, until }));
                }
                let (answer, renewed) = oneshot::channel();
                if process.lease_tx.try_send(Ask::Renew { id: lease, answer }).is_err() {
                    return again();
                }
                // Whatever becomes of the answer: its time may begin anew.
                if let Some(quiet) = &mut self.quiet {
                    quiet.begun.insert(lease, now);
                }
                Ok(Step::Goes(Renewing::Asked { answer: renewed, is_applied }))
            }
            Renewing::Asked { mut answer, is_applied } => match answer.try_recv() {
                Ok(Renewed::NotLeader) | Err(TryRecvError::Closed) => again(),
                Ok(_) if !raft.is_leader => again(),
                Ok(renewed) => {
                    self.ops[op].renewed_in = raft.term;
                    let process = self.process(m);
                    let pauses = process.status.pauses(instant);
                    let is_strange = renewed == Renewed::Unknown && alive(process, 1) == 0;
                    if !is_applied && matches!(renewed, Renewed::Ttl { .. }) {
                        // As with etcd's FastLeaseKeepAlive: whoever is late does not stop those who live.
                        self.ops[op].may_be_late = true;
                    }
                    let process = self.process(m);
                    if raft.is_alone || !is_strange && pauses == Some(process.confirmed_pauses) {
                        return go_on(self, renewed, is_applied);
                    }
                    // A process that stood still may have been replaced without knowing it (L-11).
                    let Some(permit) = gate.try_enter(1) else { return again() };
                    let (reply, answer) = Reply::new(0);
                    let deadline = instant + Duration::from_micros(REQUEST_TIMEOUT);
                    let asked = process.raft_tx.try_send(Input::Read(ReadRequest { reply, deadline, permit }));
                    assert!(asked.is_ok(), "raft's lane has room");
                    self.mark("leadership confirmed after a pause");
                    Ok(Step::Goes(Renewing::Confirms { answer, term: raft.term, pauses, renewed, is_applied }))
                }
                Err(TryRecvError::Empty) => Ok(Step::Waits(Renewing::Asked { answer, is_applied })),
            },
            Renewing::Confirms { mut answer, term, pauses, renewed, is_applied } => match answer.try_recv() {
                Ok(Ok(Response::ReadIndex(index))) => {
                    Ok(Step::Goes(Renewing::Reads { index, term, pauses, renewed, is_applied }))
                }
                Ok(_) | Err(TryRecvError::Closed) => Err(Error::NotPrimaryLessor),
                Err(TryRecvError::Empty) => {
                    Ok(Step::Waits(Renewing::Confirms { answer, term, pauses, renewed, is_applied }))
                }
            },
            Renewing::Reads { index, term, pauses, renewed, is_applied } => {
                if process.applied() < index {
                    return Ok(Step::Waits(Renewing::Reads { index, term, pauses, renewed, is_applied }));
                }
                // Another leader may have answered.
                if !raft.is_leader || raft.term != term {
                    return again();
                }
                process.confirmed_pauses = pauses.unwrap_or(process.confirmed_pauses);
                go_on(self, renewed, is_applied)
            }
            Renewing::Clears { mut answer, ttl } => match answer.try_recv() {
                Ok(Ok(_)) => Ok(Step::Done(alive(process, ttl))),
                Ok(Err(e)) => Err(e),
                Err(TryRecvError::Closed) => Err(Error::Stopped),
                Err(TryRecvError::Empty) => Ok(Step::Waits(Renewing::Clears { answer, ttl })),
            },
        }
    }

    // Requests

    /// Puts a request into the log by way of this member; the receiver of its answer and its id.
    pub fn propose(
        &mut self,
        m: usize,
        mut request: InternalRaftRequest,
        as_leader_of: Option<u64>,
    ) -> (Option<oneshot::Receiver<Outcome>>, u64) {
        let deadline = self.instant() + Duration::from_micros(REQUEST_TIMEOUT);
        let process = self.process(m);
        let id = process.next_id();
        request.header = Some(RequestHeader { id, ..Default::default() });
        let data = Bytes::from(request.encode_to_vec());
        let Some(permit) = process.proposals.try_enter(data.len()) else { return (None, id) };
        let (reply, answer) = Reply::new(0);
        let ticket = Ticket { request: Box::new(request), reply, deadline, permit };
        let proposal = Proposal { data, conf_change: false, id, as_leader_of, ticket };
        (process.raft_tx.try_send(Input::Propose(proposal)).is_ok().then_some(answer), id)
    }

    pub fn propose_change(&mut self, m: usize, change: &Change) -> (Option<oneshot::Receiver<Outcome>>, u64) {
        let deadline = self.instant() + Duration::from_micros(REQUEST_TIMEOUT);
        let process = self.process(m);
        let id = process.next_id();
        let data = Bytes::from(change.encode(id).encode_to_vec());
        let Some(permit) = process.proposals.try_enter(data.len()) else { return (None, id) };
        let (reply, answer) = Reply::new(0);
        let ticket = Ticket { request: Box::default(), reply, deadline, permit };
        let proposal = Proposal { data, conf_change: true, id, as_leader_of: None, ticket };
        (process.raft_tx.try_send(Input::Propose(proposal)).is_ok().then_some(answer), id)
    }

    pub fn request(&mut self, op: OpId) {
        let m = self.ops[op].member;
        if self.ops[op].done {
            return;
        }
        if !self.is_up(m) {
            return self.respond(op, Answer::Broken);
        }
        if self.members[m].paused_until > self.now {
            let until = self.members[m].paused_until;
            return self.at(until, Event::Request(op));
        }
        self.ops[op].arrived = true;
        self.note(&[op as u64]);
        match self.ops[op].kind.clone() {
            Kind::Write(request) => {
                let (answer, id) = self.propose(m, *request, None);
                self.ops[op].request = Some(id);
                self.requests.insert(id, op);
                match answer {
                    Some(answer) => self.process(m).waiters.push(Waiter { answer, op }),
                    None => return self.respond(op, Answer::Broken),
                }
            }
            Kind::Read(req) if req.serializable => self.read(m, op, &req),
            Kind::Read(req) => {
                let instant = self.instant();
                let process = self.process(m);
                let raft = process.reading();
                if raft.is_learner {
                    return self.respond(op, Answer::Range(Err(Error::NotLeader)));
                }
                let view = process.view.load_full();
                if process.status.needs_no_round(view.applied_term, view.applied_index) {
                    return self.read(m, op, &req);
                }
                let (reply, answer) = Reply::new(0);
                let Some(permit) = process.reads.try_enter(1) else { return self.respond(op, Answer::Broken) };
                let deadline = instant + Duration::from_micros(REQUEST_TIMEOUT);
                let asked = process.raft_tx.try_send(Input::Read(ReadRequest { reply, deadline, permit }));
                assert!(asked.is_ok(), "raft's lane has room");
                process.waiters.push(Waiter { answer, op });
            }
            Kind::Renew(_) => self.renew(m, op),
            Kind::Change(change) => {
                let (answer, id) = self.propose_change(m, &change);
                self.ops[op].request = Some(id);
                match answer {
                    Some(answer) => self.process(m).waiters.push(Waiter { answer, op }),
                    None => return self.respond(op, Answer::Broken),
                }
            }
        }
        self.pump(m);
    }

    pub fn read(&mut self, m: usize, op: OpId, req: &RangeRequest) {
        let process = self.process(m);
        let view = process.view.load_full();
        let answer = match range::range(&view.kv, &*process.in_use, req) {
            // The server reads again; here no view can come in between.
            Err(actd::mvcc::Error::ViewOutdated) => panic!("the newest view names rows that are gone"),
            answer => answer.map_err(Error::from),
        };
        self.respond(op, Answer::Range(answer));
    }

    /// Answers that have become ready at this member.
    pub fn collect(&mut self, m: usize) {
        let process = self.process(m);
        let applied = process.applied();
        let mut ready = Vec::new();
        let mut at = 0;
        while at < process.waiters.len() {
            match process.waiters[at].answer.try_recv() {
                Ok(outcome) => {
                    let waiter = process.waiters.remove(at);
                    ready.push((waiter.op, outcome));
                }
                Err(TryRecvError::Closed) => {
                    panic!("nobody answers operation {} any more", process.waiters[at].op)
                }
                Err(_) => at += 1,
            }
        }
        for (id, mut answer) in std::mem::take(&mut process.revocations) {
            match answer.try_recv() {
                // Gone already: apply has no notice of it to give.
                Ok(Err(Error::LeaseNotFound)) => {
                    process.lease_tx.control(Control::Notices(vec![LeaseNotice::Gone { id }]));
                }
                Err(TryRecvError::Empty) => process.revocations.push((id, answer)),
                _ => {}
            }
        }
        for (op, outcome) in ready {
            if let (Kind::Change(change), Ok(_)) = (&self.ops[op].kind, &outcome) {
                self.check_in_force(m, change);
            }
            match (&self.ops[op].kind, outcome) {
                (Kind::Read(_), Ok(Response::ReadIndex(index))) => self.process(m).readers.push((index, op)),
                (Kind::Read(_), Err(e)) => self.respond(op, Answer::Range(Err(e))),
                (_, outcome) => self.respond(op, Answer::Outcome(outcome)),
            }
        }
        let process = self.process(m);
        let (due, later): (Vec<_>, Vec<_>) =
            std::mem::take(&mut process.readers).into_iter().partition(|(index, _)| *index <= applied);
        process.readers = later;
        for (_, op) in due {
            if let Kind::Read(req) = self.ops[op].kind.clone() {
                self.read(m, op, &req);
            }
        }
        self.advance_renewals(m);
    }

    /// A membership change that is answered is in force in raft where it is answered (H-33).
    fn check_in_force(&self, m: usize, change: &Change) {
        let force = self.members[m].process.as_ref().expect("it answers").raft_conf_state();
        let (votes, learns) = (|id| force.voters.contains(&id), |id| force.learners.contains(&id));
        let is_in_force = match change {
            Change::Add(member) => {
                let id = member.id;
                // It may have been promoted or removed since.
                votes(id) || member.is_learner && learns(id) || self.truth.is_removed(id)
            }
            Change::Promote(id) => votes(*id) || self.truth.is_removed(*id),
            Change::Remove(id) => !votes(*id) && !learns(*id),
            Change::Update { .. } => true,
        };
        assert!(is_in_force, "m{m} answers {change:?} before it is in force: {force:?}");
    }

    pub fn respond(&mut self, op: OpId, answer: Answer) {
        let latency = self.draw((50, 2 * MS));
        self.after(latency, Event::Answer(op, answer));
    }

    /// An operation that will not be answered: its client does not know what became of it.
    pub fn give_up(&mut self, op: OpId) {
        if !self.ops[op].done {
            self.answered(op, Answer::Broken);
        }
    }

    /// What was refused as a whole must never show.
    pub fn is_refused(&mut self, id: u64) {
        self.truth.refused(id);
        self.refused.push(id);
    }
}
