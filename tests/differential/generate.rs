//! The random requests: few keys, many collisions, hostile arguments. Everything follows from the seed and from what
//! the reference answered, so a seed is a failure's address.

use std::collections::VecDeque;

use actd::pb::etcdserverpb::{
    AlarmRequest, CompactionRequest, Compare, DeleteRangeRequest, HashKvRequest, LeaseGrantRequest, LeaseRevokeRequest,
    LeaseTimeToLiveRequest, PutRequest, RangeRequest, RequestOp, TxnRequest, WatchCreateRequest, compare::TargetUnion,
    request_op,
};
use bytes::Bytes;
use rand::{RngExt, SeedableRng, rngs::StdRng};

use crate::{
    answer::{Answer, Reply},
    known::NEVER_ASKED,
};

/// What the servers are started with, so that too large requests stay cheap (G-10, G-11).
pub const MAX_REQUEST_BYTES: usize = 64 * 1024;
const OVER_REQUEST_LIMIT: usize = MAX_REQUEST_BYTES + 4_000;
const OVER_GRPC_LIMIT: usize = MAX_REQUEST_BYTES + 512 * 1024 + 4_000;
const MAX_TXN_OPS: usize = 128;
/// Stands for the id of the member that is asked.
pub const OWN_MEMBER: u64 = u64::MAX;
/// Long enough that no lease ends by itself during a session.
const LONG_TTL: i64 = 3_600;
const FAT_KEYS: u8 = 12;
const NESTING_MAX: usize = 2;

#[derive(Clone, Debug)]
pub enum Request {
    Range(RangeRequest),
    RangeStream(RangeRequest),
    Put(PutRequest),
    DeleteRange(DeleteRangeRequest),
    Txn(TxnRequest),
    Compact(CompactionRequest),
    LeaseGrant(LeaseGrantRequest),
    LeaseRevoke(LeaseRevokeRequest),
    LeaseKeepAlive(i64),
    LeaseTimeToLive(LeaseTimeToLiveRequest),
    LeaseLeases,
    HashKv(HashKvRequest),
    Alarm(AlarmRequest),
}

/// What happens next in a session.
#[derive(Clone, Debug)]
pub enum Step {
    Call(Request),
    /// On stream `.0`.
    WatchCreate(usize, WatchCreateRequest),
    /// On stream `.0`, of a watch id that may not exist.
    WatchCancel(usize, i64),
    /// An empty request, which a server ignores (W-11).
    WatchNothing(usize),
    /// Waits until both servers have delivered everything, and compares. With a progress request (W-42).
    Sync {
        progress: bool,
    },
    /// Before history goes: waits as `Sync` does, and ends the watchers whose fate would depend on timing.
    Settle,
    /// Ends stream `.0` and opens another.
    WatchReopen(usize),
}

pub struct Generator {
    rng: StdRng,
    queue: VecDeque<Step>,
    pub streams: usize,
    pub server_leases: bool,
    pub revision: i64,
    pub compacted: i64,
    leases: Vec<i64>,
    gone_leases: Vec<i64>,
    armed: Vec<AlarmRequest>,
    calm_in: u32,
    /// The reference is an etcd 3.4: nothing is asked that it cannot take (`known::NOT_ASKED_OF_OLD`).
    spare_old: bool,
}

impl Generator {
    pub fn new(seed: u64, streams: usize, server_leases: bool, spare_old: bool) -> Self {
        Self {
            rng: StdRng::seed_from_u64(seed),
            queue: VecDeque::new(),
            streams,
            server_leases,
            revision: 1,
            compacted: 0,
            leases: Vec::new(),
            gone_leases: vec![77],
            armed: Vec::new(),
            calm_in: 0,
            spare_old,
        }
    }

    /// The next step, made such that it is none of `known::NEVER_ASKED`.
    pub fn step(&mut self) -> Step {
        let mut step = self.any_step();
        if let Step::Call(request) = &mut step {
            NEVER_ASKED.iter().for_each(|never| (never.spare)(request));
        }
        step
    }

    fn any_step(&mut self) -> Step {
        if let Some(step) = self.queue.pop_front() {
            return step;
        }
        if !self.armed.is_empty() {
            if self.calm_in == 0 {
                let mut alarm = self.armed.pop().expect("not empty");
                alarm.action = 2;
                return Step::Call(Request::Alarm(alarm));
            }
            self.calm_in -= 1;
        }
        match self.rng.random_range(0..1000) {
            0..255 => Step::Call(Request::Put(self.put())),
            255..456 => Step::Call(Request::Range(self.range(true))),
            456..496 => Step::Call(Request::RangeStream(self.range_of_stream())),
            496..586 => Step::Call(Request::DeleteRange(self.delete())),
            586..796 => {
                let flat = self.spare_old && !self.armed.is_empty();
                Step::Call(Request::Txn(self.txn(if flat { NESTING_MAX } else { 0 })))
            }
            796..811 => self.compact(),
            811..846 => Step::Call(Request::LeaseGrant(self.grant())),
            846..866 => Step::Call(Request::LeaseRevoke(LeaseRevokeRequest { id: self.lease() })),
            866..881 => Step::Call(Request::LeaseKeepAlive(self.lease())),
            881..896 => {
                let request = LeaseTimeToLiveRequest { id: self.lease(), keys: self.rng.random_bool(0.6) };
                Step::Call(Request::LeaseTimeToLive(request))
            }
            896..904 => Step::Call(Request::LeaseLeases),
            904..918 => Step::Call(Request::HashKv(HashKvRequest { revision: self.read_revision() })),
            918..928 => Step::Call(Request::Alarm(self.alarm())),
            928..964 => {
                let stream = self.stream();
                Step::WatchCreate(stream, self.watch())
            }
            964..982 => {
                let stream = self.stream();
                Step::WatchCancel(stream, self.watch_id())
            }
            982..985 => Step::WatchNothing(self.stream()),
            985..989 => Step::Sync { progress: self.rng.random_bool(0.7) },
            989..991 => Step::WatchReopen(self.stream()),
            991..993 => {
                self.fat_revision();
                self.any_step()
            }
            993..997 => Step::Call(Request::Put(self.oversized_put())),
            _ => Step::Call(Request::Txn(self.oversized_txn())),
        }
    }

    /// Learns from the reference what the next requests may refer to.
    pub fn learn(&mut self, request: &Request, reply: &Reply) {
        match (request, reply) {
            (Request::Compact(compact), Ok(Answer::Compact(_))) => self.compacted = compact.revision,
            (Request::LeaseGrant(grant), Ok(Answer::LeaseGrant(granted))) => {
                self.gone_leases.retain(|id| *id != granted.id);
                if grant.ttl < 600 {
                    // It would end by itself some time later; it goes at once, while both servers still have it.
                    let revoke = LeaseRevokeRequest { id: granted.id };
                    self.queue.push_front(Step::Call(Request::LeaseRevoke(revoke)));
                }
                self.leases.push(granted.id);
            }
            (Request::LeaseRevoke(revoke), Ok(_)) => {
                self.leases.retain(|id| *id != revoke.id);
                self.gone_leases.push(revoke.id);
                if self.gone_leases.len() > 4 {
                    self.gone_leases.remove(0);
                }
            }
            (Request::LeaseRevoke(revoke), Err(error))
                if error.message.contains("corrupt")
                    && !self.queue.iter().any(|step| matches!(step, Step::Call(Request::LeaseRevoke(_)))) =>
            {
                // Refused under the alarm: once more when it is over.
                self.calm_in = 0;
                while let Some(mut alarm) = self.armed.pop() {
                    alarm.action = 2;
                    self.queue.push_back(Step::Call(Request::Alarm(alarm)));
                }
                self.queue.push_back(Step::Call(Request::LeaseRevoke(*revoke)));
            }
            (Request::Alarm(alarm), Ok(_)) if alarm.action == 1 && alarm.alarm != 0 => {
                if !self.armed.iter().any(|a| a.member_id == alarm.member_id && a.alarm == alarm.alarm) {
                    self.armed.push(*alarm);
                }
                self.calm_in = 12;
            }
            _ => {}
        }
        if let Some(revision) = reply.as_ref().ok().and_then(Answer::revision) {
            self.revision = self.revision.max(revision);
        }
    }

    fn stream(&mut self) -> usize {
        self.rng.random_range(0..self.streams)
    }

    fn one_of<T: Clone>(&mut self, items: &[T]) -> T {
        items[self.rng.random_range(0..items.len())].clone()
    }

    fn key(&mut self) -> Bytes {
        const KEYS: &[&[u8]] =
            &[b"a", b"a\0", b"aa", b"ab", b"b", b"b/1", b"b/2", b"c", b"\0", b"\xff", b"\xff\xff", b"k1", b"k2", b"z"];
        if self.rng.random_range(0..100) < 2 {
            return Bytes::new();
        }
        Bytes::from_static(self.one_of(KEYS))
    }

    fn range_end(&mut self, key: &Bytes) -> Bytes {
        match self.rng.random_range(0..10) {
            0..4 => Bytes::new(),
            4 => Bytes::from_static(b"\0"),
            5..8 => self.key(),
            _ => prefix_end(key),
        }
    }

    fn value(&mut self) -> Bytes {
        match self.rng.random_range(0..20) {
            0..2 => Bytes::new(),
            2..16 => Bytes::from(vec![b'a' + self.rng.random_range(0..4u8); self.rng.random_range(1..4)]),
            16..19 => Bytes::from(vec![b'x'; self.rng.random_range(100..400)]),
            _ => Bytes::from(vec![b'X'; 4_000]),
        }
    }

    fn lease(&mut self) -> i64 {
        match self.rng.random_range(0..10) {
            0..7 if !self.leases.is_empty() => {
                let leases = self.leases.clone();
                self.one_of(&leases)
            }
            7 => 0,
            8 => self.one_of(&[-1, i64::MIN, i64::MAX, 999_999]),
            _ if self.gone_leases.is_empty() => 77,
            _ => {
                let gone = self.gone_leases.clone();
                self.one_of(&gone)
            }
        }
    }

    /// A revision to read at: mostly sensible, sometimes compacted, future or nonsense.
    fn read_revision(&mut self) -> i64 {
        match self.rng.random_range(0..20) {
            0..9 => 0,
            9 => self.revision,
            10..14 => self.revision - self.rng.random_range(0..20),
            14 => self.compacted,
            15 => self.compacted - 1,
            16 => self.compacted + 1,
            17 => self.revision + self.rng.random_range(1..10),
            18 => self.one_of(&[-1, -2, -5, 1, i64::MIN, i64::MAX]),
            _ => self.rng.random_range(0..self.revision + 1),
        }
    }

    fn range(&mut self, filters: bool) -> RangeRequest {
        let key = self.key();
        let mut range = RangeRequest { range_end: self.range_end(&key), key, ..Default::default() };
        range.revision = self.read_revision();
        if self.rng.random_bool(0.4) {
            range.limit = self.one_of(&[1, 2, 3, 5, 1000, -1, i64::MIN, i64::MAX]);
        }
        if self.rng.random_bool(0.35) {
            range.sort_order = self.one_of(&[0, 1, 1, 2, 2]);
            range.sort_target = self.rng.random_range(0..5);
        }
        if self.spare_old {
            // It does not check them.
        } else if self.rng.random_bool(0.02) {
            range.sort_order = self.one_of(&[3, -1, i32::MAX]);
        } else if self.rng.random_bool(0.02) {
            range.sort_target = self.one_of(&[5, -1, i32::MIN]);
        }
        range.serializable = self.rng.random_bool(0.4);
        range.keys_only = self.rng.random_bool(0.15);
        range.count_only = self.rng.random_bool(0.1);
        if filters && self.rng.random_bool(0.25) {
            self.filter(&mut range);
        }
        range
    }

    fn filter(&mut self, range: &mut RangeRequest) {
        let near = self.revision - self.rng.random_range(0..30);
        match self.rng.random_range(0..5) {
            0 => range.min_mod_revision = near,
            1 => range.max_mod_revision = near,
            2 => range.min_create_revision = near,
            3 => range.max_create_revision = near,
            _ => {
                range.min_mod_revision = near;
                range.max_create_revision = near + 3;
                range.max_mod_revision = self.one_of(&[-1, self.revision, i64::MAX]);
                range.min_create_revision = self.one_of(&[-1, 1, i64::MIN]);
            }
        }
    }

    /// Some are refused for their order, some for their filters (KV-30), and some have both.
    fn range_of_stream(&mut self) -> RangeRequest {
        let mut range = self.range(false);
        let kind = self.rng.random_range(0..20);
        if kind < 3 {
            (range.sort_order, range.sort_target) = self.one_of(&[(1, 1), (1, 4), (2, 0), (2, 2), (2, 3)]);
        } else if range.sort_order > 0 {
            (range.sort_order, range.sort_target) = (1, 0);
        }
        if (2..5).contains(&kind) {
            self.filter(&mut range);
        }
        range
    }

    fn put(&mut self) -> PutRequest {
        let mut put = PutRequest { key: self.key(), value: self.value(), ..Default::default() };
        if self.rng.random_bool(0.25) {
            put.lease = self.lease();
        }
        put.prev_kv = self.rng.random_bool(0.3);
        if self.rng.random_bool(0.1) {
            put.ignore_value = true;
            if self.rng.random_bool(0.8) {
                put.value = Bytes::new();
            }
        }
        if self.rng.random_bool(0.1) {
            put.ignore_lease = true;
            if self.rng.random_bool(0.8) {
                put.lease = 0;
            }
        }
        put
    }

    fn delete(&mut self) -> DeleteRangeRequest {
        let key = self.key();
        let range_end = match self.rng.random_range(0..10) {
            0..6 => Bytes::new(),
            _ => self.range_end(&key),
        };
        DeleteRangeRequest { key, range_end, prev_kv: self.rng.random_bool(0.4) }
    }

    fn compare(&mut self) -> Compare {
        let key = self.key();
        let range_end = if self.rng.random_bool(0.25) { self.range_end(&key) } else { Bytes::new() };
        let target = self.rng.random_range(0..5);
        let mut result = self.rng.random_range(0..4);
        if self.rng.random_bool(0.02) {
            result = self.one_of(&[4, -1]);
        }
        let near = self.revision - self.rng.random_range(0..6);
        let union_of = if self.rng.random_bool(0.05) { self.rng.random_range(0..5) } else { target };
        let target_union = match union_of {
            0 => TargetUnion::Version(self.one_of(&[0, 0, 1, 2, -1])),
            1 => TargetUnion::CreateRevision(self.one_of(&[0, near, i64::MAX])),
            2 => TargetUnion::ModRevision(self.one_of(&[0, near, i64::MIN])),
            3 => TargetUnion::Value(self.value()),
            _ => {
                let lease = self.lease();
                if lease > i64::from(u32::MAX) {
                    result &= 3;
                    // Ids that a server chose are not in the same order on the other one.
                    result = if result % 2 == 0 { 0 } else { 3 };
                }
                TargetUnion::Lease(lease)
            }
        };
        let target_union = if self.rng.random_bool(0.05) { None } else { Some(target_union) };
        Compare { result, target, key, range_end, target_union }
    }

    fn txn(&mut self, depth: usize) -> TxnRequest {
        let compares = self.one_of(&[0, 0, 1, 1, 2]);
        let success = self.one_of(&[0, 1, 1, 2, 3]);
        let failure = self.one_of(&[0, 1, 1, 2]);
        TxnRequest {
            compare: (0..compares).map(|_| self.compare()).collect(),
            success: (0..success).map(|_| self.operation(depth)).collect(),
            failure: (0..failure).map(|_| self.operation(depth)).collect(),
        }
    }

    fn operation(&mut self, depth: usize) -> RequestOp {
        use request_op::Request as Op;
        let request = match self.rng.random_range(0..100) {
            0..35 => Some(Op::RequestPut(self.put())),
            35..62 => {
                let mut range = self.range(true);
                if self.rng.random_bool(0.6) {
                    range.revision = 0; // else most transactions would fail by it
                }
                Some(Op::RequestRange(range))
            }
            62..82 => Some(Op::RequestDeleteRange(self.delete())),
            82..98 if depth < NESTING_MAX => Some(Op::RequestTxn(self.txn(depth + 1))),
            82..98 => Some(Op::RequestRange(self.range(true))),
            _ => None,
        };
        RequestOp { request }
    }

    /// More operations than allowed, at the top or by what the parent left over (KV-61).
    fn oversized_txn(&mut self) -> TxnRequest {
        let put = |i: usize| RequestOp {
            request: Some(request_op::Request::RequestPut(PutRequest {
                key: Bytes::from(format!("many/{i}")),
                ..Default::default()
            })),
        };
        let count = MAX_TXN_OPS + self.rng.random_range(0..3);
        match self.rng.random_range(0..4) {
            0 => TxnRequest { success: (0..count).map(put).collect(), ..Default::default() },
            1 => TxnRequest { failure: (0..count).map(put).collect(), ..Default::default() },
            2 => {
                let compare = Compare { key: Bytes::from_static(b"a"), ..Default::default() };
                TxnRequest { compare: vec![compare; count], ..Default::default() }
            }
            _ => {
                let inner = TxnRequest { success: (0..count - 3).map(put).collect(), ..Default::default() };
                let nested = RequestOp { request: Some(request_op::Request::RequestTxn(inner)) };
                TxnRequest { success: vec![nested, put(1000), put(1001)], ..Default::default() }
            }
        }
    }

    fn oversized_put(&mut self) -> PutRequest {
        let size = self.one_of(&[OVER_REQUEST_LIMIT, OVER_REQUEST_LIMIT, OVER_GRPC_LIMIT]);
        PutRequest { key: Bytes::from_static(b"big"), value: Bytes::from(vec![0; size]), ..Default::default() }
    }

    /// One revision whose events with `prev_kv` pass the size from which responses are fragmented (W-31).
    fn fat_revision(&mut self) {
        let stream = self.stream();
        let (key, range_end) = (Bytes::from_static(b"fat/"), Bytes::from_static(b"fat0"));
        let watch = WatchCreateRequest {
            key: key.clone(),
            range_end: range_end.clone(),
            prev_kv: true,
            fragment: self.rng.random_bool(0.8),
            ..Default::default()
        };
        self.queue.push_back(Step::WatchCreate(stream, watch));
        for i in 0..FAT_KEYS {
            let put = PutRequest {
                key: Bytes::from(format!("fat/{i:02}")),
                value: Bytes::from(vec![i; MAX_REQUEST_BYTES - 1_000]),
                ..Default::default()
            };
            self.queue.push_back(Step::Call(Request::Put(put)));
        }
        let delete = DeleteRangeRequest { key, range_end, prev_kv: false };
        self.queue.push_back(Step::Call(Request::DeleteRange(delete)));
        self.queue.push_back(Step::WatchReopen(stream));
    }

    /// Everything written before has been delivered when history goes, or what is delivered would depend on timing.
    fn compact(&mut self) -> Step {
        let revision = match self.rng.random_range(0..10) {
            0..2 => (self.revision - 40).max(self.compacted + 1),
            2 => self.revision,
            3..5 => self.compacted,
            5 => self.compacted - 1,
            6..9 => self.revision + self.rng.random_range(1..5),
            _ => self.one_of(&[0, -1, i64::MIN, i64::MAX]),
        };
        // A second one waits for the first, whose hash else comes some time later (M-30, KV-78).
        if self.rng.random_bool(0.5) {
            let compact = CompactionRequest { revision, physical: false };
            self.queue.push_back(Step::Call(Request::Compact(compact)));
        }
        let compact = CompactionRequest { revision, physical: true };
        self.queue.push_back(Step::Call(Request::Compact(compact)));
        if revision > self.compacted && revision <= self.revision || revision <= 0 {
            Step::Settle
        } else {
            self.any_step()
        }
    }

    fn grant(&mut self) -> LeaseGrantRequest {
        let id = match self.rng.random_range(0..10) {
            0..4 if self.server_leases => 0,
            0..8 => self.rng.random_range(1..9),
            8 => self.one_of(&[-3, i64::MIN, i64::MAX]),
            _ => self.lease(),
        };
        let id = if id == 0 && !self.server_leases { 5 } else { id };
        let ttl = match self.rng.random_range(0..20) {
            0 => self.one_of(&[0, -1, 1, i64::MIN]),
            1..4 => self.one_of(&[9_000_000_001, i64::MAX]),
            4 => 9_000_000_000,
            _ => LONG_TTL + self.rng.random_range(0..100),
        };
        LeaseGrantRequest { ttl, id }
    }

    fn alarm(&mut self) -> AlarmRequest {
        let action = self.one_of(&[0, 0, 0, 1, 1, 1, 2, 2]);
        let none = i32::from(self.spare_old && action == 1);
        AlarmRequest {
            action,
            member_id: self.one_of(&[0, OWN_MEMBER, OWN_MEMBER, 77]),
            alarm: match self.armed.first() {
                // 3.4 obeys the alarm raised last instead of the stronger one.
                Some(armed) if self.spare_old && action == 1 => armed.alarm,
                _ => self.one_of(&[none, none, 1, 1, 2, 2]),
            },
        }
    }

    fn watch_id(&mut self) -> i64 {
        self.one_of(&[0, 0, 1, 2, 3, 4, 5, 100, -5, i64::MAX])
    }

    fn watch(&mut self) -> WatchCreateRequest {
        let key = self.key();
        let range_end = self.range_end(&key);
        let start_revision = match self.rng.random_range(0..20) {
            0..9 => 0,
            9..12 => self.revision + 1,
            12..15 => self.rng.random_range(self.compacted.max(1)..self.revision + 1),
            15 => self.compacted.max(1),
            16 => self.compacted - 1,
            17 => self.revision + self.rng.random_range(2..20),
            18 => self.one_of(&[-1, i64::MIN]),
            _ => 1,
        };
        let start_revision = match start_revision {
            start if !self.spare_old => start,
            start if start == self.compacted && start > 0 => start + 1,
            start => start.max(0),
        };
        let filters = match self.rng.random_range(0..10) {
            0 => vec![0],
            1 => vec![1],
            2 => vec![0, 1],
            3 => vec![7, -1],
            _ => vec![],
        };
        WatchCreateRequest {
            key,
            range_end,
            start_revision,
            progress_notify: self.rng.random_bool(0.2),
            filters,
            prev_kv: self.rng.random_bool(0.4),
            watch_id: if self.rng.random_bool(0.3) { self.watch_id() } else { 0 },
            fragment: self.rng.random_bool(0.3),
        }
    }
}

/// The end of the range of all keys with this prefix (KV-12).
fn prefix_end(prefix: &Bytes) -> Bytes {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < 0xff {
            end.push(last + 1);
            return end.into();
        }
    }
    Bytes::from_static(b"\0")
}
