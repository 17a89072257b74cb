//! What members do with requests: proposals, reads, leases and their keepalives, and who is told what became of them.

use std::time::Duration;

use actd::{
    apply::{Error, Outcome, Reply, Response, Ticket},
    cluster::Change,
    lease::Renewal as Renewed,
    mvcc::range,
    pb::etcdserverpb::{InternalRaftRequest, LeaseRevokeRequest, RangeRequest, RequestHeader},
    raft::{Proposal, ReadRequest},
};
use bytes::Bytes;
use prost::Message as _;

use super::{
    client::Kind,
    member::{Renewal, Waiter},
    plan::{LATE, MS, REQUEST_TIMEOUT, SECOND},
    world::{Answer, Event, OpId, World},
};

impl World {
    // Leases

    pub fn follow_leadership(&mut self, m: usize) {
        let now_ms = self.now.div_ceil(MS);
        let id = self.members[m].id;
        let process = self.process(m);
        let now = process.raft.reading();
        if now.is_leader {
            let view = process.view.load_full();
            if process.lease_term != Some(now.term) && view.applied_term >= now.term {
                process.lease_term = Some(now.term);
                process.expirer.on_leader(now_ms, &view.leases);
                self.say(|| format!("m{m} leads in term {}", now.term));
            }
            self.truth.leads(id, now.term);
        } else if process.lease_term.take().is_some() {
            process.expirer.on_demoted();
            self.say(|| format!("m{m} leads no more"));
        }
    }

    pub fn lease_tick(&mut self, m: usize) {
        let now_ms = self.now / MS;
        let process = self.process(m);
        if let Some(term) = process.lease_term {
            for id in process.expirer.tick(now_ms) {
                let request =
                    InternalRaftRequest { lease_revoke: Some(LeaseRevokeRequest { id }), ..Default::default() };
                let (answer, _) = self.propose(m, request, Some(term));
                self.say(|| format!("m{m} revokes lease {id}, which ran out"));
                if let Some(answer) = answer {
                    self.process(m).revocations.push((id, answer));
                }
            }
        }
        let renewals: Vec<OpId> = self.process(m).renewals.iter().map(|renewal| renewal.op).collect();
        for op in renewals {
            self.renew(m, op);
        }
        self.turn(m);
    }

    /// New revocations in the log: one by a leader's clock must not come before a promise has ended.
    pub fn revoked(&mut self) {
        while let Some(&(lease, request)) = self.truth.revoked.get(self.revocations_seen) {
            self.revocations_seen += 1;
            if self.requests.contains_key(&request) {
                continue;
            }
            self.expired.insert(lease, self.now);
            self.mark("lease ran out");
            let until = self.promised.get(&lease).copied().unwrap_or(0);
            let now = self.now;
            let until = until.saturating_sub(self.grace());
            assert!(now >= until, "lease {lease} ran out at {now} µs, but was promised until {until} µs");
        }
    }

    /// A leader that others have replaced promises until it notices, two election timeouts at most; its successor adds one to
    /// every lease, after the one it took to be elected. What is on its way meanwhile comes on top, as in etcd.
    fn grace(&self) -> u64 {
        let late = if self.plan.config.late > 0.0 { LATE.1 } else { 0 };
        late + 3 * self.plan.config.latency.1
    }

    /// Somebody was told that a lease lives for `ttl` seconds, by a call that began at `start`.
    pub fn promise(&mut self, lease: i64, start: u64, ttl: i64) {
        let until = start + ttl as u64 * SECOND;
        if let Some(at) = self.expired.get(&lease) {
            assert!(
                *at + self.grace() >= until,
                "lease {lease} ran out at {at} µs, but a call of {start} µs was told {ttl} s"
            );
        }
        let promised = self.promised.entry(lease).or_default();
        *promised = (*promised).max(until);
    }

    /// A keepalive at the member where its client is, or at the leader that it was forwarded to.
    pub fn renew(&mut self, m: usize, op: OpId) {
        let Kind::Renew(lease) = self.ops[op].kind else { return };
        if self.ops[op].done {
            self.process(m).renewals.retain(|renewal| renewal.op != op);
            return;
        }
        let (now, instant) = (self.now, self.instant());
        let process = self.process(m);
        if !process.renewals.iter().any(|renewal| renewal.op == op) {
            process.renewals.push(Renewal { op, confirming: None, deadline: now + REQUEST_TIMEOUT });
        }
        let at = process.renewals.iter().position(|renewal| renewal.op == op).expect("just looked");
        let raft = process.raft.reading();
        let mut answer = None;
        if raft.is_leader {
            if process.renewals[at].confirming.is_some() {
                return;
            }
            let alive = process.view.load().leases.contains(lease);
            match process.expirer.on_renew(lease, now.div_ceil(MS)) {
                Renewed::Renewed { ttl, .. } => {
                    let pauses = process.status.pauses(instant);
                    if !raft.is_alone && pauses != Some(process.confirmed_pauses) {
                        // A process that stood still may have been replaced without knowing it (L-11).
                        process.renewals[at].confirming = Some((raft.term, pauses, ttl));
                        let (reply, receiver) = Reply::new(0);
                        let permit = process.gate.try_enter(1).expect("few read at once");
                        let deadline = instant + Duration::from_micros(REQUEST_TIMEOUT);
                        process.raft.read(ReadRequest { reply, deadline, permit });
                        process.waiters.push(Waiter { answer: receiver, op });
                        return self.mark("leadership confirmed after a pause");
                    }
                    answer = Some(if alive { ttl } else { 0 });
                }
                Renewed::Expired | Renewed::Unknown if !alive => answer = Some(0),
                _ => {}
            }
        } else if raft.leader != 0
            && let Some(leader) = self.index_of(raft.leader)
            && self.ops[op].member == m
            && now >= self.ops[op].forwarded + 500 * MS
            && !self.is_cut(m, leader)
            && !self.is_cut(leader, m)
        {
            self.ops[op].forwarded = now;
            let latency = self.draw(self.plan.config.latency);
            self.after(latency, Event::Forwarded(leader, op));
        }
        let process = self.process(m);
        if let Some(ttl) = answer {
            process.renewals.remove(at);
            self.respond(op, Answer::Renewed(Ok(ttl)));
        } else if process.renewals[at].deadline <= now {
            process.renewals.remove(at);
            self.respond(op, Answer::Renewed(Err(Error::Timeout)));
        }
    }

    /// A round says that somebody led when it began; this member if it still does.
    fn confirmed(&mut self, m: usize, op: OpId) {
        let Kind::Renew(lease) = self.ops[op].kind else { return };
        let process = self.process(m);
        let Some(at) = process.renewals.iter().position(|renewal| renewal.op == op) else { return };
        let Some((term, pauses, ttl)) = process.renewals[at].confirming.take() else { return };
        let raft = process.raft.reading();
        if !raft.is_leader || raft.term != term {
            return;
        }
        process.confirmed_pauses = pauses.unwrap_or(process.confirmed_pauses);
        process.renewals.remove(at);
        let ttl = if process.view.load().leases.contains(lease) { ttl } else { 0 };
        self.respond(op, Answer::Renewed(Ok(ttl)));
    }

    // Requests

    /// Puts a request into the log by way of this member; the receiver of its answer and its id.
    pub fn propose(
        &mut self,
        m: usize,
        mut request: InternalRaftRequest,
        as_leader_of: Option<u64>,
    ) -> (Option<tokio::sync::oneshot::Receiver<Outcome>>, u64) {
        let deadline = self.instant() + Duration::from_micros(REQUEST_TIMEOUT);
        let process = self.process(m);
        let id = process.next_id();
        request.header = Some(RequestHeader { id, ..Default::default() });
        let data = Bytes::from(request.encode_to_vec());
        let Some(permit) = process.gate.try_enter(data.len()) else { return (None, id) };
        let (reply, answer) = Reply::new(0);
        let ticket = Ticket { request: Box::new(request), reply, deadline, permit };
        process.raft.propose(Proposal { data, conf_change: false, id, as_leader_of, ticket });
        (Some(answer), id)
    }

    pub fn propose_change(&mut self, m: usize, change: &Change) -> Option<tokio::sync::oneshot::Receiver<Outcome>> {
        let deadline = self.instant() + Duration::from_micros(REQUEST_TIMEOUT);
        let process = self.process(m);
        let id = process.next_id();
        let data = Bytes::from(change.encode(id).encode_to_vec());
        let permit = process.gate.try_enter(data.len())?;
        let (reply, answer) = Reply::new(0);
        let ticket = Ticket { request: Box::default(), reply, deadline, permit };
        process.raft.propose(Proposal { data, conf_change: true, id, as_leader_of: None, ticket });
        Some(answer)
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
                self.turn(m);
            }
            Kind::Read(req) if req.serializable => self.read(m, op, &req),
            Kind::Read(req) => {
                let instant = self.instant();
                let process = self.process(m);
                let raft = process.raft.reading();
                if raft.is_learner {
                    return self.respond(op, Answer::Range(Err(Error::NotLeader)));
                }
                // As the server: the only member needs no round.
                let view = process.view.load_full();
                let alone = raft.is_leader
                    && raft.is_alone
                    && view.applied_term == raft.term
                    && view.applied_index >= raft.alone_from;
                if alone {
                    return self.read(m, op, &req);
                }
                let (reply, answer) = Reply::new(0);
                let Some(permit) = process.gate.try_enter(1) else { return self.respond(op, Answer::Broken) };
                let deadline = instant + Duration::from_micros(REQUEST_TIMEOUT);
                process.raft.read(ReadRequest { reply, deadline, permit });
                process.waiters.push(Waiter { answer, op });
                self.turn(m);
            }
            Kind::Renew(_) => {
                self.renew(m, op);
                self.turn(m);
            }
            Kind::Change(change) => {
                match self.propose_change(m, &change) {
                    Some(answer) => self.process(m).waiters.push(Waiter { answer, op }),
                    None => return self.respond(op, Answer::Broken),
                }
                self.turn(m);
            }
        }
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
        let applied = process.applied;
        let mut ready = Vec::new();
        let mut at = 0;
        while at < process.waiters.len() {
            match process.waiters[at].answer.try_recv() {
                Ok(outcome) => {
                    let waiter = process.waiters.remove(at);
                    ready.push((waiter.op, outcome));
                }
                Err(tokio::sync::oneshot::error::TryRecvError::Closed) => {
                    panic!("nobody answers operation {} any more", process.waiters[at].op)
                }
                Err(_) => at += 1,
            }
        }
        process.revocations.retain_mut(|(_, answer)| answer.try_recv().is_err());
        for (op, outcome) in ready {
            match (&self.ops[op].kind, outcome) {
                (Kind::Read(_) | Kind::Renew(_), Ok(Response::ReadIndex(index))) => {
                    self.process(m).readers.push((index, op));
                }
                (Kind::Read(_), Err(e)) => self.respond(op, Answer::Range(Err(e))),
                (Kind::Renew(_), Err(_)) => {
                    self.process(m).renewals.retain(|renewal| renewal.op != op);
                    self.respond(op, Answer::Renewed(Err(Error::NotPrimaryLessor)));
                }
                (_, outcome) => self.respond(op, Answer::Outcome(outcome)),
            }
        }
        let process = self.process(m);
        let (due, later): (Vec<_>, Vec<_>) =
            std::mem::take(&mut process.readers).into_iter().partition(|(index, _)| *index <= applied);
        process.readers = later;
        for (_, op) in due {
            match self.ops[op].kind.clone() {
                Kind::Read(req) => self.read(m, op, &req),
                _ => self.confirmed(m, op),
            }
        }
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
