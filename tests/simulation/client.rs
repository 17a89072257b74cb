//! Clients: what they ask, what they make of the answers, and what they know afterwards.

use std::hash::{DefaultHasher, Hash, Hasher};

use actd::{
    apply::{Error, Response},
    cluster::Change,
    pb::etcdserverpb::{
        CompactionRequest, Compare, DeleteRangeRequest, InternalRaftRequest, LeaseGrantRequest, LeaseRevokeRequest,
        PutRequest, RangeRequest, RequestOp, TxnRequest, compare::TargetUnion, request_op::Request,
    },
};
use bytes::Bytes;
use rand::{RngExt, rngs::StdRng, seq::IndexedRandom};

use super::{
    member::MIN_TTL,
    plan::{MS, SECOND},
    truth::Place,
    world::{Answer, Event, OpId, World, key},
};

pub struct Client {
    /// The member it is connected to.
    member: usize,
    op: Option<OpId>,
    /// What it asks again, because it was not done or nobody said so.
    again: Option<Kind>,
    /// The lease it keeps alive, and until when it bothers.
    lease: Option<(i64, u64)>,
    /// Revisions it has heard of.
    revision: i64,
    written: u64,
}

#[derive(Clone, Debug)]
pub enum Kind {
    Write(Box<InternalRaftRequest>),
    Read(RangeRequest),
    Renew(i64),
    Change(Change),
}

/// What everybody is asked in the end, one after another.
#[derive(Clone, Copy)]
pub enum Last {
    Grant,
    Renew,
    Revoke,
}

pub struct Op {
    /// `None`: an administrator's.
    pub client: Option<usize>,
    pub member: usize,
    pub kind: Kind,
    pub start: u64,
    /// What it must not stand before.
    pub floor: Place,
    /// The member has it.
    pub arrived: bool,
    /// As it is named in the log.
    pub request: Option<u64>,
    pub done: bool,
    /// It did what it was to do.
    pub is_ok: bool,
    /// Of a keepalive: its lease was there when it began.
    pub was_alive: bool,
    /// Of a keepalive: the term of the leader that renewed.
    pub renewed_in: u64,
    /// Of a keepalive: its leader has not applied for a second what it knows to be committed.
    pub may_be_late: bool,
}

/// How long a client waits for an answer.
const PATIENCE: (u64, u64) = (800 * MS, 9 * SECOND);

impl Client {
    pub fn new(member: usize) -> Self {
        Self { member, op: None, again: None, lease: None, revision: 1, written: 0 }
    }
}

impl World {
    pub fn begin(&mut self, client: Option<usize>, member: usize, kind: Kind) -> OpId {
        let op = self.ops.len();
        let (start, floor) = (self.now, self.truth.begin());
        let was_alive = matches!(kind, Kind::Renew(lease) if self.truth.model.leases.contains_key(&lease));
        self.ops.push(Op {
            client,
            member,
            kind,
            start,
            floor,
            arrived: false,
            request: None,
            done: false,
            is_ok: false,
            was_alive,
            renewed_in: 0,
            may_be_late: false,
        });
        let latency = self.draw((50, 2 * MS));
        self.after(latency, Event::Request(op));
        let patience = if client.is_some() { self.draw(PATIENCE) } else { PATIENCE.1 };
        self.after(patience, Event::GiveUp(op));
        op
    }

    /// When all is well each member writes and reads for who asks it, and serves leases from their grant to their end: one
    /// that another of `voters` has granted. Ids from `lease` on are free.
    pub fn ask_everybody(&mut self, voters: &[usize], last: Last, lease: i64) -> Vec<OpId> {
        let mut ops = Vec::new();
        for (nth, m) in voters.iter().enumerate() {
            let write = |request| Kind::Write(Box::new(request));
            let id = lease + nth as i64;
            let of_another = lease + ((nth + 1) % voters.len()) as i64;
            let kinds = match last {
                Last::Grant => {
                    let (key, value) = (key(&mut self.rng, 1), format!("m{m}").into());
                    let put = Some(PutRequest { key, value, ..Default::default() });
                    let lease_grant = Some(LeaseGrantRequest { ttl: MIN_TTL + 2, id });
                    let all = Bytes::from_static(b"\0");
                    vec![
                        write(InternalRaftRequest { put, ..Default::default() }),
                        Kind::Read(RangeRequest { key: all.clone(), range_end: all, ..Default::default() }),
                        write(InternalRaftRequest { lease_grant, ..Default::default() }),
                    ]
                }
                Last::Renew => vec![Kind::Renew(of_another)],
                Last::Revoke => {
                    let lease_revoke = Some(LeaseRevokeRequest { id: of_another });
                    vec![write(InternalRaftRequest { lease_revoke, ..Default::default() })]
                }
            };
            ops.extend(kinds.into_iter().map(|kind| self.begin(None, *m, kind)));
        }
        ops
    }

    pub fn voters(&self) -> Vec<usize> {
        let members = self.membership().expect("somebody is up");
        members.iter().filter(|member| !member.is_learner).filter_map(|member| self.index_of(member.id)).collect()
    }

    pub fn client_turn(&mut self, c: usize) {
        if self.is_closing || self.clients[c].op.is_some() {
            return;
        }
        if !self.is_up(self.clients[c].member) || self.rng.random_bool(0.03) {
            self.clients[c].member = self.another_member();
        }
        let member = self.clients[c].member;
        let kind = match self.clients[c].again.take() {
            Some(kind) => {
                self.mark("a client asks again");
                kind
            }
            None => self.choose(c),
        };
        let op = self.begin(Some(c), member, kind.clone());
        self.say(|| format!("client {c} asks m{member}, operation {op}: {}", shown(&kind)));
        self.clients[c].op = Some(op);
    }

    /// Whom a client tries next. When all is calm somebody has told it who takes part.
    fn another_member(&mut self) -> usize {
        let members = self.membership().filter(|_| self.is_calm);
        let known = members.iter().flat_map(|members| members.iter()).filter_map(|member| self.index_of(member.id));
        let known: Vec<usize> = known.collect();
        match known.len() {
            0 => self.rng.random_range(0..self.members.len()),
            n => known[self.rng.random_range(0..n)],
        }
    }

    fn choose(&mut self, c: usize) -> Kind {
        let now = self.now;
        if let Some((lease, until)) = self.clients[c].lease {
            if now >= until {
                self.clients[c].lease = None;
            } else if self.rng.random_bool(0.3) {
                return Kind::Renew(lease);
            }
        }
        let mix = self.config().mix.clone();
        let all = mix.put + mix.get + mix.delete + mix.txn + mix.compact + mix.lease;
        let mut draw = self.rng.random_range(0..all);
        // One kind after another, each with its share.
        let mut is = |weight: u32| match draw.checked_sub(weight) {
            None => true,
            Some(rest) => {
                draw = rest;
                false
            }
        };
        let write = |request| Kind::Write(Box::new(request));
        if is(mix.put) {
            let put = Some(self.put(c));
            write(InternalRaftRequest { put, ..Default::default() })
        } else if is(mix.get) {
            let keys = self.config().keys;
            let newest = self.clients[c].revision;
            Kind::Read(range(&mut self.rng, keys, newest, true))
        } else if is(mix.delete) {
            let keys = self.config().keys;
            let delete_range = Some(delete(&mut self.rng, keys));
            write(InternalRaftRequest { delete_range, ..Default::default() })
        } else if is(mix.txn) {
            let depth = self.rng.random_range(1..=3);
            let mut used = Vec::new();
            let txn = Some(self.txn(c, depth, &mut used));
            write(InternalRaftRequest { txn, ..Default::default() })
        } else if is(mix.compact) {
            let newest = self.clients[c].revision;
            let revision = self.rng.random_range((newest - 30).max(1)..=newest + 1);
            let compaction = Some(CompactionRequest { revision, physical: self.rng.random_bool(0.3) });
            write(InternalRaftRequest { compaction, ..Default::default() })
        } else if let Some((id, _)) = self.clients[c].lease
            && self.rng.random_bool(0.4)
        {
            if self.rng.random_bool(0.5) {
                self.clients[c].lease = None;
            }
            write(InternalRaftRequest { lease_revoke: Some(LeaseRevokeRequest { id }), ..Default::default() })
        } else {
            // Each id once: a promise belongs to one life of a lease.
            let id = self.next_lease;
            self.next_lease += 1;
            let ttl = self.rng.random_range(1..=MIN_TTL + 2);
            write(InternalRaftRequest { lease_grant: Some(LeaseGrantRequest { ttl, id }), ..Default::default() })
        }
    }

    fn value(&mut self, c: usize) -> Bytes {
        let client = &mut self.clients[c];
        client.written += 1;
        let mut value = format!("{c}.{}", client.written).into_bytes();
        let bytes = self.plan.config.value_bytes;
        value.resize(value.len().max(self.rng.random_range(0..=bytes)), b'.');
        value.into()
    }

    fn put(&mut self, c: usize) -> PutRequest {
        let keys = self.config().keys;
        let mut put = PutRequest { key: key(&mut self.rng, keys), ..Default::default() };
        put.prev_kv = self.rng.random_bool(0.2);
        match self.rng.random_range(0..12) {
            0 => put.ignore_value = true,
            1 => put.ignore_lease = true,
            _ => {}
        }
        if !put.ignore_value {
            put.value = self.value(c);
        }
        if !put.ignore_lease && self.rng.random_bool(0.4) {
            put.lease = match self.clients[c].lease {
                Some((lease, _)) => lease,
                None if self.rng.random_bool(0.2) => self.rng.random_range(1..=self.next_lease),
                None => 0,
            };
        }
        put
    }

    /// As clients may send it: no key is put twice, none is put and deleted.
    fn txn(&mut self, c: usize, depth: u32, used: &mut Vec<Bytes>) -> TxnRequest {
        let keys = self.config().keys;
        let newest = self.clients[c].revision;
        let compares = self.rng.random_range(0..=2);
        let compare = (0..compares).map(|_| compare(&mut self.rng, keys, newest)).collect();
        let mut branch = |world: &mut World| {
            let mut ops = Vec::new();
            for _ in 0..world.rng.random_range(1..=3) {
                let request = match world.rng.random_range(0..10) {
                    0..4 => Request::RequestRange(range(&mut world.rng, keys, newest, false)),
                    4..8 => {
                        let put = world.put(c);
                        if used.contains(&put.key) {
                            continue;
                        }
                        used.push(put.key.clone());
                        Request::RequestPut(put)
                    }
                    8 => {
                        let key = key(&mut world.rng, keys);
                        if used.contains(&key) {
                            continue;
                        }
                        used.push(key.clone());
                        let prev_kv = world.rng.random_bool(0.5);
                        Request::RequestDeleteRange(DeleteRangeRequest { key, range_end: Bytes::new(), prev_kv })
                    }
                    _ if depth > 1 => Request::RequestTxn(world.txn(c, depth - 1, used)),
                    _ => continue,
                };
                ops.push(RequestOp { request: Some(request) });
            }
            ops
        };
        let (success, failure) = (branch(self), branch(self));
        TxnRequest { compare, success, failure }
    }

    pub fn answered(&mut self, op: OpId, answer: Answer) {
        if std::mem::replace(&mut self.ops[op].done, true) {
            return;
        }
        let Op { client, ref kind, start, floor, request, was_alive, renewed_in, may_be_late, .. } = self.ops[op];
        let kind = kind.clone();
        self.say(|| format!("operation {op} ends: {}", shown_answer(&answer)));
        self.ops[op].is_ok = matches!(answer, Answer::Outcome(Ok(_)) | Answer::Range(Ok(_)) | Answer::Renewed(Ok(1..)));
        if let (Kind::Change(Change::Promote(_)), true) = (&kind, self.ops[op].is_ok) {
            self.mark("learner promoted");
        }
        // A lease is granted once: a promise belongs to one life of it.
        let is_grant = matches!(&kind, Kind::Write(write) if write.lease_grant.is_some());
        if let Some(client) = client.filter(|_| !self.ops[op].is_ok && !is_grant)
            && self.rng.random_bool(0.5)
        {
            self.clients[client].again = Some(kind.clone());
        }
        let mut hasher = DefaultHasher::new();
        format!("{answer:?}").hash(&mut hasher);
        self.note(&[op as u64, hasher.finish()]);
        let mut revision = None;
        match (&kind, &answer) {
            (Kind::Write(write), Answer::Outcome(outcome)) => {
                let id = request.expect("it was proposed");
                match outcome {
                    Ok(_)
                    | Err(
                        Error::Compacted
                        | Error::FutureRev
                        | Error::KeyNotFound
                        | Error::LeaseNotFound
                        | Error::LeaseExists,
                    ) => self.truth.written(id, floor, outcome),
                    Err(
                        Error::DeadlineExceeded | Error::NotLeader | Error::ProposalDropped | Error::TooManyRequests,
                    ) => {
                        self.is_refused(id);
                    }
                    Err(Error::Timeout | Error::Stopped) => {}
                    Err(e) => panic!("nobody should hear this: {e}"),
                }
                revision = outcome.as_ref().ok().and_then(revision_of);
                if let (Some(revoke), Ok(_)) = (&write.lease_revoke, outcome) {
                    self.revoked_at.insert(revoke.id, self.now);
                }
                if let (Some(client), Some(grant), Ok(Response::LeaseGrant(granted))) =
                    (client, &write.lease_grant, outcome)
                {
                    self.promise(grant.id, start, granted.ttl, self.truth.term_of(id));
                    let until = self.now + self.draw((0, 10 * SECOND));
                    self.clients[client].lease = Some((grant.id, until));
                }
            }
            (Kind::Change(_), Answer::Outcome(outcome)) => {
                let id = request.expect("it was proposed");
                match outcome {
                    Ok(Response::Members(members)) => self.truth.changed(id, floor, Ok(members)),
                    Err(Error::Member(refusal)) => {
                        self.mark("a membership change is refused");
                        self.truth.changed(id, floor, Err(*refusal));
                    }
                    Err(
                        Error::DeadlineExceeded | Error::NotLeader | Error::ProposalDropped | Error::TooManyRequests,
                    ) => self.is_refused(id),
                    Err(Error::Timeout | Error::Stopped) => {}
                    other => panic!("no membership change should hear this: {other:?}"),
                }
            }
            (Kind::Read(req), Answer::Range(Ok(answer))) => {
                self.truth.read(req, floor, answer);
                revision = answer.header.as_ref().map(|h| h.revision);
            }
            (Kind::Read(req), Answer::Range(Err(e))) => {
                let known = matches!(
                    e,
                    Error::Compacted
                        | Error::FutureRev
                        | Error::Timeout
                        | Error::LeaderChanged
                        | Error::NotLeader
                        | Error::Stopped
                );
                assert!(known, "nobody should hear this: {e}");
                self.truth.read_refused(req, floor, e);
            }
            (Kind::Renew(lease), Answer::Renewed(Ok(ttl))) if *ttl > 0 => {
                let revoked = self.revoked_at.get(lease).copied().unwrap_or(u64::MAX);
                assert!(
                    may_be_late || revoked >= start,
                    "lease {lease} was revoked at {revoked} µs, and renewed from {start} µs on"
                );
                // One that is gone meanwhile answers with what it was told at its grant.
                if let Some((granted, _)) = self.truth.model.leases.get(lease) {
                    assert_eq!(ttl, granted, "lease {lease} lives for another time");
                }
                self.promise(*lease, start, *ttl, renewed_in);
            }
            (Kind::Renew(lease), Answer::Renewed(Ok(_))) => {
                let is_there = was_alive && self.truth.model.leases.contains_key(lease);
                assert!(!is_there, "lease {lease} is there, and a keepalive from {start} µs on says that it is not");
                if let Some(client) = client {
                    self.clients[client].lease = None;
                }
            }
            (Kind::Renew(lease), Answer::Renewed(Err(e))) => {
                let known = matches!(
                    e,
                    Error::NoLeader
                        | Error::Timeout
                        | Error::TimeoutAppliedIndex
                        | Error::NotPrimaryLessor
                        | Error::Stopped
                        | Error::DeadlineExceeded
                        | Error::ProposalDropped
                        | Error::TooManyRequests
                );
                assert!(known, "nobody should hear this of lease {lease}: {e}");
            }
            _ => {}
        }
        if let Some(c) = client {
            // Who hears nothing does not count.
            self.stats.calls += u64::from(!matches!(answer, Answer::Broken));
            let unanswered = matches!(
                answer,
                Answer::Broken
                    | Answer::Outcome(Err(Error::Timeout | Error::Stopped | Error::DeadlineExceeded))
                    | Answer::Range(Err(Error::Timeout | Error::NotLeader | Error::Stopped | Error::DeadlineExceeded))
            );
            if unanswered && self.rng.random_bool(0.5) {
                // It tries another member.
                self.clients[c].member = self.another_member();
            }
            let think = self.draw(self.plan.config.think);
            let client = &mut self.clients[c];
            client.op = None;
            client.revision = client.revision.max(revision.unwrap_or(0));
            self.after(think, Event::Client(c));
        }
    }
}

fn revision_of(response: &Response) -> Option<i64> {
    let header = match response {
        Response::Put(r) => &r.header,
        Response::DeleteRange(r) => &r.header,
        Response::Txn(r) => &r.header,
        _ => return None,
    };
    header.as_ref().map(|h| h.revision)
}

fn span(rng: &mut StdRng, keys: usize) -> (Bytes, Bytes) {
    let (a, b) = (key(rng, keys), key(rng, keys));
    match rng.random_range(0..6) {
        0 => (Bytes::from_static(b"\0"), Bytes::from_static(b"\0")),
        1 => (a, Bytes::from_static(b"\0")),
        2 if a < b => (a, b),
        _ => (a, Bytes::new()),
    }
}

fn range(rng: &mut StdRng, keys: usize, newest: i64, alone: bool) -> RangeRequest {
    let (key, range_end) = span(rng, keys);
    let revision = match rng.random_range(0..8) {
        0 => rng.random_range(1..=newest),
        1 => (newest + 2 - rng.random_range(0..20)).max(1),
        _ => 0,
    };
    RangeRequest {
        key,
        range_end,
        revision,
        limit: if rng.random_bool(0.2) { rng.random_range(1..5) } else { 0 },
        keys_only: rng.random_bool(0.1),
        count_only: rng.random_bool(0.1),
        serializable: alone && rng.random_bool(0.3),
        ..Default::default()
    }
}

fn delete(rng: &mut StdRng, keys: usize) -> DeleteRangeRequest {
    let (key, range_end) = if rng.random_bool(0.15) { span(rng, keys) } else { (key(rng, keys), Bytes::new()) };
    DeleteRangeRequest { key, range_end, prev_kv: rng.random_bool(0.3) }
}

fn compare(rng: &mut StdRng, keys: usize, newest: i64) -> Compare {
    let (key, range_end) = span(rng, keys);
    let revision = if rng.random_bool(0.3) { 0 } else { rng.random_range(0..=newest) };
    let (target, union) = match rng.random_range(0..5) {
        0 => (0, TargetUnion::Version(rng.random_range(0..4))),
        1 => (1, TargetUnion::CreateRevision(revision)),
        2 => (2, TargetUnion::ModRevision(revision)),
        3 => (3, TargetUnion::Value(Bytes::from_static(b"1."))),
        _ => (4, TargetUnion::Lease(rng.random_range(0..5))),
    };
    let result = *[0, 1, 2, 3].choose(rng).expect("there are choices");
    Compare { result, target, key, range_end, target_union: Some(union) }
}

fn shown(kind: &Kind) -> String {
    match kind {
        Kind::Write(request) => {
            let text = format!("{request:?}");
            let parts = text.split(", ").filter(|part| !part.ends_with("None") && !part.ends_with("None }"));
            parts.collect::<Vec<_>>().join(", ").chars().take(400).collect()
        }
        Kind::Read(req) => {
            format!("range {:?} to {:?} at {} serializable {}", req.key, req.range_end, req.revision, req.serializable)
        }
        Kind::Renew(lease) => format!("renew lease {lease}"),
        Kind::Change(change) => format!("{change:?}"),
    }
}

fn shown_answer(answer: &Answer) -> String {
    format!("{answer:?}").chars().take(200).collect()
}
