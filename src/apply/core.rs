//! The apply core: one committed entry in, changed state and an outcome out.

use std::sync::Arc;

use bytes::Bytes;
use prost::Message;

use super::{Alarms, Committed, ConfChanged, Error, Outcome, Reply, Response, View, decode};
use crate::{
    actor::Permit,
    cluster::{Change as MemberChange, Members, Version, v2_request},
    lease::{self, Leases},
    mvcc::{
        self,
        change::Change,
        hash::{CompactionJob, HashKv},
        store::{Store, Tally},
    },
    pb::{
        etcdserverpb::{self as pb, InternalRaftRequest, alarm_request::AlarmAction},
        raftpb,
    },
    sim::{self, Bug},
    storage::{Bucket, Storage, WriteBatch},
    telemetry::requests::Kind,
};

/// Meta row: raft index of the newest entry whose effects are stored, 8 bytes big-endian.
pub const APPLIED_INDEX_KEY: &[u8] = b"consistent_index";
/// Meta row: term of that entry, 8 bytes big-endian.
pub const APPLIED_TERM_KEY: &[u8] = b"term";

/// Replicated decisions depend on these; all members run with the same values.
#[derive(Clone, Debug)]
pub struct Settings {
    pub member_id: u64,
    /// Of this binary. Decides no result: a cluster version above it ends the process.
    pub release: Version,
    pub min_lease_ttl: i64,
    pub max_learners: usize,
    /// Keep the remaining time of checkpointed leases over a restart.
    pub persist_lease_checkpoints: bool,
    /// Effective space quota; `None`: no limit. Decides no result here, only whether an alarm is asked for.
    pub quota_bytes: Option<u64>,
}

/// What one batch leaves to do after it is committed and its view published.
#[derive(Debug, Default)]
pub struct Effects {
    pub answers: Vec<(Reply, Outcome)>,
    pub changes: Vec<Change>,
    /// For the lease expirer: leases granted, with their time to live, and gone.
    pub lease_notices: Vec<LeaseNotice>,
    pub conf_changed: Option<ConfChanged>,
    /// Space is short and no alarm says so yet.
    pub wants_alarm: bool,
    /// For who keeps count.
    pub tally: Tally,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaseNotice {
    Granted { id: i64, ttl: i64 },
    Gone { id: i64 },
}

/// A caller of a physical compaction.
#[derive(Debug)]
struct CompactWaiter {
    reply: Reply,
    outcome: Outcome,
    /// As many may wait as may propose.
    _permit: Permit,
}

pub struct Core {
    storage: Arc<dyn Storage>,
    store: Store,
    leases: Leases,
    alarms: Alarms,
    members: Members,
    settings: Settings,
    applied_index: u64,
    applied_term: u64,
    /// Rows of the batch in hand that are not key-value rows.
    batch: WriteBatch,
    /// Index and term already in the store's meta rows.
    stored_applied: u64,
    effects: Effects,
    compact_waiters: Vec<CompactWaiter>,
    /// Readers or waiters are to be told something although nothing was applied.
    news: bool,
}

impl Core {
    /// Reads the state from storage: one scan of the rows.
    pub fn open(storage: Arc<dyn Storage>, settings: Settings) -> Result<Self, mvcc::Error> {
        let mut leases = Leases::load(&*storage, settings.min_lease_ttl)?;
        let store = Store::open(storage.clone(), &mut leases)?;
        let alarms = Alarms::load(&*storage)?;
        let members = Members::load(&*storage)?;
        let applied_index = read_number(&*storage, APPLIED_INDEX_KEY)?;
        let applied_term = read_number(&*storage, APPLIED_TERM_KEY)?;
        Ok(Self {
            storage,
            store,
            leases,
            alarms,
            members,
            settings,
            applied_index,
            applied_term,
            batch: WriteBatch::default(),
            stored_applied: applied_index,
            effects: Effects::default(),
            compact_waiters: Vec::new(),
            news: false,
        })
    }

    /// From now on rows are read from and written to `storage`, which holds the same.
    pub fn use_storage(&mut self, storage: Arc<dyn Storage>) {
        self.store.use_storage(storage.clone());
        self.storage = storage;
    }

    pub fn applied_index(&self) -> u64 {
        self.applied_index
    }

    pub fn members(&self) -> &Members {
        &self.members
    }

    /// Applies one committed entry.
    ///
    /// Answers what kind of request it was and whether it was carried out, for who keeps count.
    pub fn apply(&mut self, entry: Committed) -> Option<(Kind, bool)> {
        if entry.index <= self.applied_index {
            // Replayed after a restart. A membership change must still come into force in raft: its effect on raft's
            // configuration is in the start configuration, so it is answered without one.
            if entry.conf_change {
                let answer = entry.ticket.map(|ticket| (ticket.reply, Err(Error::Timeout)));
                self.effects.conf_changed = Some(ConfChanged { index: entry.index, change: None, answer });
            } else if let Some(ticket) = entry.ticket {
                // A snapshot has brought its effect without its result.
                self.effects.answers.push((ticket.reply, Err(Error::Timeout)));
            }
            return None;
        }
        // Pair of the check in `raft::core`: it hands out no gaps, we accept none.
        assert_eq!(entry.index, self.applied_index + 1, "gap in the committed log");
        self.applied_index = entry.index;
        self.applied_term = entry.term;

        if entry.conf_change {
            self.apply_conf_change(entry);
            return None;
        }
        match entry.ticket {
            Some(ticket) => {
                let kind = Kind::of(&ticket.request);
                let mut done = true;
                if let Some(outcome) =
                    self.apply_request(*ticket.request, Some((ticket.reply, ticket.permit)), entry.index)
                {
                    let (reply, outcome) = outcome;
                    done = outcome.is_ok();
                    self.effects.answers.push((reply.expect("a ticket has someone who waits"), outcome));
                }
                Some((kind, done))
            }
            None if entry.data.is_empty() => None, // the first entry of a leader's term
            None => {
                let request = decode::request(&entry.data);
                let request = match request.or_else(|_| v2_request::read(&entry.data)) {
                    Ok(request) => request,
                    Err(e) => panic!("log entry {} cannot be read: {e}", entry.index),
                };
                let kind = Kind::of(&request);
                let request = if sim::has(Bug::UncheckedTxn) { without_ranges(request) } else { request };
                let outcome = self.apply_request(request, None, entry.index);
                Some((kind, outcome.is_none_or(|(_, outcome)| outcome.is_ok())))
            }
        }
    }

    /// The outcome with who waits for it, unless a physical compaction keeps it until the rows are gone.
    fn apply_request(
        &mut self,
        request: InternalRaftRequest,
        waiter: Option<(Reply, Permit)>,
        index: u64,
    ) -> Option<(Option<Reply>, Outcome)> {
        let physical = request.compaction.as_ref().is_some_and(|c| c.physical);
        let outcome = self.execute(request, index);
        let waits = matches!(outcome, Ok(_) | Err(Error::Compacted));
        if physical
            && waits
            && let Some((reply, permit)) = waiter
        {
            // Also after COMPACTED: a clean-up may be under way (KV-78).
            self.compact_waiters.push(CompactWaiter { reply, outcome, _permit: permit });
            return None;
        }
        // The permit is freed here: the work is done.
        Some((waiter.map(|(reply, _)| reply), outcome))
    }

    fn execute(&mut self, mut request: InternalRaftRequest, index: u64) -> Outcome {
        // Variants in the order of their use.
        if let Some(put) = request.put.take() {
            self.check_writable(true)?;
            self.note_quota(mvcc::txn::put_cost(&put));
            return Ok(Response::Put(self.store.put(&put, &mut self.leases)?));
        }
        if let Some(txn) = request.txn.take() {
            let cost = mvcc::txn::txn_cost(&txn);
            self.check_writable(cost > 0)?;
            self.note_quota(cost);
            return Ok(Response::Txn(self.store.txn(&txn, &mut self.leases)?));
        }
        if let Some(delete) = request.delete_range.take() {
            self.check_writable(false)?;
            return Ok(Response::DeleteRange(self.store.delete_range(&delete, &mut self.leases)?));
        }
        if let Some(grant) = request.lease_grant.take() {
            return self.lease_grant(grant);
        }
        if let Some(revoke) = request.lease_revoke.take() {
            return self.lease_revoke(revoke.id);
        }
        if let Some(checkpoints) = request.lease_checkpoint.take() {
            for c in checkpoints.checkpoints {
                // A lease that went meanwhile needs none.
                let persist = self.settings.persist_lease_checkpoints;
                let _ = self.leases.checkpoint(c.id, c.remaining_ttl, persist, &mut self.batch);
            }
            return Ok(Response::Done);
        }
        if let Some(compaction) = request.compaction.take() {
            self.check_writable(false)?;
            self.store.compact(compaction.revision)?;
            return Ok(Response::Compact(pb::CompactionResponse { header: self.header() }));
        }
        if let Some(alarm) = request.alarm.take() {
            return self.alarm(alarm);
        }
        if let Some(attributes) = request.cluster_member_attr_set.take() {
            if let Err(e) = self.members.set_attributes(attributes, &mut self.batch) {
                panic!("log entry {index}: {e}");
            }
            return Ok(Response::Done);
        }
        if let Some(version) = request.cluster_version_set.take() {
            if let Err(e) = self.members.set_version(&version, self.settings.release, &mut self.batch) {
                panic!("log entry {index}: {e}");
            }
            return Ok(Response::Done);
        }
        if let Some(downgrade) = request.downgrade_info_set.take() {
            self.members.set_downgrade(downgrade, &mut self.batch);
            return Ok(Response::Done);
        }
        if request.range.is_some() || request.auth_status.is_some() {
            return Ok(Response::Done); // read-only kinds of older members change nothing
        }
        panic!("log entry {index} holds a request of a kind this version does not know; it must not be skipped")
    }

    /// CORRUPT stops every write, NOSPACE those that cost space (M-11 to M-13).
    fn check_writable(&self, costs_space: bool) -> Result<(), Error> {
        if self.alarms.is_empty() {
            return Ok(());
        }
        if self.alarms.is_active(pb::AlarmType::Corrupt) {
            return Err(Error::Corrupt);
        }
        if costs_space && self.alarms.is_active(pb::AlarmType::Nospace) {
            return Err(Error::NoSpace);
        }
        Ok(())
    }

    /// Applying never depends on this member's size; it only asks for an alarm (M-18).
    fn note_quota(&mut self, cost: u64) {
        if let Some(quota) = self.settings.quota_bytes
            && cost > 0
            && self.store.sizes().total + cost >= quota
        {
            self.effects.wants_alarm = true;
        }
    }

    fn header(&self) -> Option<pb::ResponseHeader> {
        Some(pb::ResponseHeader { revision: self.store.revision(), ..Default::default() })
    }

    fn lease_grant(&mut self, grant: pb::LeaseGrantRequest) -> Outcome {
        self.check_writable(true)?;
        let ttl = self.leases.grant(grant.id, grant.ttl, &mut self.batch).map_err(|e| match e {
            lease::Error::TtlTooLarge => Error::LeaseTtlTooLarge,
            lease::Error::Exists => Error::LeaseExists,
            lease::Error::NotFound => Error::LeaseNotFound,
        })?;
        self.effects.lease_notices.push(LeaseNotice::Granted { id: grant.id, ttl });
        Ok(Response::LeaseGrant(pb::LeaseGrantResponse {
            header: self.header(),
            id: grant.id,
            ttl,
            error: String::new(),
        }))
    }

    fn lease_revoke(&mut self, id: i64) -> Outcome {
        self.check_writable(false)?;
        let mut keys = self.leases.revoke(id, &mut self.batch).map_err(|_| Error::LeaseNotFound)?;
        if sim::has(Bug::RevokeOrder) && self.settings.member_id.is_multiple_of(2) {
            keys.reverse();
        }
        self.store.delete_keys(&keys, &mut self.leases);
        self.effects.lease_notices.push(LeaseNotice::Gone { id });
        Ok(Response::LeaseRevoke(pb::LeaseRevokeResponse { header: self.header() }))
    }

    fn alarm(&mut self, request: pb::AlarmRequest) -> Outcome {
        let alarms = match AlarmAction::try_from(request.action) {
            Ok(AlarmAction::Get) => self.alarms.list(request.alarm),
            Ok(AlarmAction::Activate) => self.alarms.activate(request.member_id, request.alarm, &mut self.batch),
            Ok(AlarmAction::Deactivate) => self.alarms.deactivate(request.member_id, request.alarm, &mut self.batch),
            Err(_) => return Err(Error::AlarmAction(request.action)),
        };
        Ok(Response::Alarm(pb::AlarmResponse { header: self.header(), alarms }))
    }

    fn apply_conf_change(&mut self, entry: Committed) {
        let unreadable = |e: &dyn std::fmt::Display| -> ! { panic!("log entry {}: {e}", entry.index) };
        let change = match raftpb::ConfChange::decode(entry.data.clone()) {
            Ok(change) => change,
            Err(e) => unreadable(&e),
        };
        let kind = change.r#type();
        let node_id = change.node_id.unwrap_or(0);
        let change = match MemberChange::decode(&change) {
            Ok(change) => change,
            Err(e) => unreadable(&e),
        };
        let done = self.members.apply(change, self.settings.max_learners, &mut self.batch);
        let change = done.is_ok().then_some((kind, node_id));
        let outcome = done.map(|()| Response::Members(self.members.clone())).map_err(Error::Member);
        let mut answer = entry.ticket.map(|t| (t.reply, outcome));
        if sim::has(Bug::AnswerBeforeInForce) {
            self.effects.answers.extend(answer.take());
        }
        self.effects.conf_changed = Some(ConfChanged { index: entry.index, change, answer });
    }

    /// This state takes the place of `before`.
    pub fn follow(&mut self, before: &Self) {
        self.store.inherit_hashes(&before.store);
    }

    /// Another state takes the place of this one: whoever still waits for something of it.
    pub fn abandon(self) -> impl Iterator<Item = (Reply, Outcome)> {
        self.compact_waiters.into_iter().map(|w| (w.reply, w.outcome))
    }

    /// True while condemned rows wait to be deleted.
    pub fn is_cleaning(&self) -> bool {
        self.store.is_cleaning()
    }

    /// True while a compaction has not deleted all it condemns or has not left its hash.
    pub fn is_compacting(&self) -> bool {
        self.store.is_compacting()
    }

    /// The hash to compute of a compaction, if any. After its commit, before the next slice of clean-up.
    pub fn take_hash_job(&mut self) -> Option<CompactionJob> {
        self.store.take_hash_job()
    }

    /// What came of the job.
    pub fn hashed(&mut self, hash: Option<HashKv>) {
        self.store.hashed(hash);
        self.news = true;
    }

    /// Deletes some condemned rows. Only after the view with the compaction is out.
    pub fn clean_slice(&mut self, keys: usize) {
        self.store.clean_slice(keys);
    }

    /// Commits the batch in hand. `None` if nothing happened since the last one. After a failure nothing may be
    /// acknowledged any more.
    pub fn commit(&mut self) -> Result<Option<Effects>, crate::storage::Error> {
        let (mut batch, changes) = self.store.take_batch();
        batch.writes.append(&mut self.batch.writes);
        let moved = self.applied_index != self.stored_applied;
        let owes = self.effects.conf_changed.is_some() || !self.effects.answers.is_empty();
        if !moved && batch.is_empty() && !owes && !self.news {
            return Ok(None);
        }
        if sim::has(Bug::AppliedIndexBeforeData) && moved {
            let mut meta = WriteBatch::default();
            meta.put(Bucket::Meta, APPLIED_INDEX_KEY, Bytes::copy_from_slice(&self.applied_index.to_be_bytes()));
            self.storage.commit(meta)?;
        }
        if moved && !(sim::has(Bug::DataWithoutAppliedIndex) && self.store.is_cleaning()) {
            batch.put(Bucket::Meta, APPLIED_INDEX_KEY, Bytes::copy_from_slice(&self.applied_index.to_be_bytes()));
            batch.put(Bucket::Meta, APPLIED_TERM_KEY, Bytes::copy_from_slice(&self.applied_term.to_be_bytes()));
        }
        if !batch.is_empty() {
            self.storage.commit(batch)?;
        }
        self.stored_applied = self.applied_index;
        self.news = false;
        self.store.committed();
        let mut effects = std::mem::take(&mut self.effects);
        effects.changes = changes;
        effects.tally = self.store.take_tally();
        if !self.store.is_compacting() {
            effects.answers.extend(self.compact_waiters.drain(..).map(|w| (w.reply, w.outcome)));
        }
        Ok(Some(effects))
    }

    /// The committed state.
    pub fn view(&self) -> View {
        View {
            kv: Arc::new(self.store.view()),
            leases: self.leases.set().clone(),
            alarms: self.alarms.clone(),
            members: self.members.clone(),
            applied_index: self.applied_index,
            applied_term: self.applied_term,
        }
    }
}

impl mvcc::store::Leases for Leases {
    fn exists(&self, lease: i64) -> bool {
        self.exists(lease)
    }

    fn lease_of(&self, key: &[u8]) -> i64 {
        self.lease_of(key)
    }

    fn attach(&mut self, lease: i64, key: &Bytes) {
        self.attach(lease, key);
    }

    fn detach(&mut self, key: &[u8]) {
        self.detach(key);
    }
}

/// What [`Bug::UncheckedTxn`] leaves of a transaction.
fn without_ranges(mut request: InternalRaftRequest) -> InternalRaftRequest {
    use pb::request_op::Request::RequestRange;
    if let Some(txn) = &mut request.txn {
        for ops in [&mut txn.success, &mut txn.failure] {
            ops.retain(|op| !matches!(op.request, Some(RequestRange(_))));
        }
    }
    request
}

/// A number in a meta row; 0 if there is none.
pub fn read_number(storage: &dyn Storage, key: &[u8]) -> Result<u64, crate::storage::Error> {
    match storage.get(Bucket::Meta, key)? {
        None => Ok(0),
        Some(row) => row.as_ref().try_into().map(u64::from_be_bytes).map_err(|_| {
            crate::storage::Error::Fatal(format!(
                "meta row {} has {} bytes, not 8",
                String::from_utf8_lossy(key),
                row.len()
            ))
        }),
    }
}
