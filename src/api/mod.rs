//! gRPC: one file per etcd service. Handlers keep no state: they validate, talk to actors, and read views.

pub mod cluster;
pub mod health;
pub mod kv;
pub mod lease;
mod long;
pub mod maintenance;
mod metered;
mod routes;
pub mod status;
pub mod unimplemented;
pub mod validate;
pub mod watch;

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicBool, AtomicU64, Ordering},
};
use std::time::{Duration, Instant};

use bytes::Bytes;
use prost::Message;
use tokio::sync::Notify;

pub use routes::Routes;

use crate::{
    actor::{Gate, Registry, Sender},
    apply::{self, ApplySender, Error, Reply, Response, Ticket, View, ViewCell},
    cluster::{Version, v2_request},
    lease::actor::{Ask as LeaseAsk, Control as LeaseControl},
    mvcc::{
        self,
        hash::{self, HashKv},
    },
    pb::etcdserverpb::{InternalRaftRequest, RequestHeader, ResponseHeader},
    peer::Links,
    raft::{self, Input, Proposal, RaftSender, ReadRequest},
    storage::StoreInUse,
    telemetry::{Metrics, requests::Kind},
};

/// A read round that takes longer counts as slow: it has been asked for more than once.
const SLOW_READ: Duration = Duration::from_millis(500);

/// Limits and names the handlers work by.
#[derive(Clone, Debug)]
pub struct Settings {
    pub cluster_id: u64,
    pub member_id: u64,
    pub max_request_bytes: usize,
    pub max_txn_ops: usize,
    /// Effective quota; `None`: no limit.
    pub quota_bytes: Option<u64>,
    /// As configured, for Status.
    pub quota_configured: i64,
    /// How long a proposal or a read round may take: 5 s + 2 election timeouts.
    pub request_timeout: Duration,
    pub min_lease_ttl: i64,
    pub strict_reconfig_check: bool,
    pub election_timeout: Duration,
    /// Requests that take longer are worth a line in the log.
    pub slow_request: Duration,
    /// Keepalives of known leases go on after a second although the applier is still late.
    pub fast_lease_keep_alive: bool,
    /// Whether `/debug/pprof/` is there.
    pub profiles: bool,
    /// Name, stage and state of each feature gate.
    pub features: Vec<(&'static str, &'static str, bool)>,
}

/// What every handler may reach; one for the process.
pub struct Server {
    parts: Parts,
    links: OnceLock<Arc<dyn Links>>,
    /// Told each time this member has been without a leader for long.
    pub no_leader: Arc<Notify>,
    /// Told when this member has been removed from its cluster: it stops.
    pub removed: Notify,
    request_counter: AtomicU64,
    /// A NOSPACE alarm has been asked for and is under way.
    alarm_asked: AtomicBool,
    /// Of this member's pauses: after so many its leadership was confirmed.
    confirmed_pauses: AtomicU64,
}

/// A handler's view of the server: the server and the RPC runtime it runs in.
#[derive(Clone)]
pub struct Handle {
    pub server: Arc<Server>,
    /// Which delivery queue brings this runtime's answers.
    pub runtime: usize,
    pub watch: crate::watch::Client,
}

/// What a server is made of.
pub struct Parts {
    pub settings: Settings,
    pub view: ViewCell,
    pub storage: Arc<StoreInUse>,
    pub raft: RaftSender,
    pub raft_status: Arc<raft::Status>,
    pub apply: ApplySender,
    pub leases: Sender<LeaseAsk, LeaseControl>,
    /// Admission of proposals.
    pub gate: Gate,
    /// Admission of reads that need a round.
    pub reads: Gate,
    /// Memory for the pieces of long answers.
    pub answer_pieces: Gate,
    /// Memory for long answers that are made whole.
    pub answers_whole: Gate,
    pub registry: Registry,
    pub metrics: Metrics,
    /// Unix milliseconds at start, the seed of request ids.
    pub started_unix_ms: u64,
}

impl std::ops::Deref for Server {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        &self.parts
    }
}

impl Server {
    pub fn new(parts: Parts) -> Self {
        Self {
            links: OnceLock::new(),
            no_leader: Arc::default(),
            removed: Notify::new(),
            request_counter: AtomicU64::new(parts.started_unix_ms << 8),
            alarm_asked: AtomicBool::new(false),
            confirmed_pauses: AtomicU64::new(0),
            parts,
        }
    }

    /// Unique over members and restarts: 16 bits of the member id, then a counter that began at the start's time.
    pub fn next_id(&self) -> u64 {
        const COUNTER: u64 = (1 << 48) - 1;
        let count = self.request_counter.fetch_add(1, Ordering::Relaxed) + 1;
        (self.settings.member_id << 48) | (count & COUNTER)
    }

    /// A header that names this member; `revision` 0 leaves the revision out.
    pub fn header(&self, revision: i64, term: u64) -> ResponseHeader {
        ResponseHeader {
            cluster_id: self.settings.cluster_id,
            member_id: self.settings.member_id,
            revision,
            raft_term: term,
        }
    }

    pub fn header_of(&self, view: &View) -> ResponseHeader {
        self.header(view.kv.revision, self.raft_status.read().term)
    }

    /// Completes the header of a replicated request's answer, which has only the revision.
    pub fn complete(&self, header: &mut Option<ResponseHeader>) {
        let header = header.get_or_insert_default();
        header.cluster_id = self.settings.cluster_id;
        header.member_id = self.settings.member_id;
        header.raft_term = self.raft_status.read().term;
    }

    pub fn set_links(&self, links: Arc<dyn Links>) {
        assert!(self.links.set(links).is_ok(), "a member has one transport");
    }

    /// The connections to other members, once there are any.
    pub fn links(&self) -> Option<&Arc<dyn Links>> {
        self.links.get()
    }

    /// Since when the member `id` has been connected without a break.
    pub fn connected_since(&self, id: u64) -> Option<Instant> {
        self.links.get()?.connected_since(id)
    }

    /// A view that shows every write acknowledged before the call (D-8).
    pub async fn linearizable_view(&self, runtime: usize) -> Result<Arc<View>, Error> {
        let view = self.view.load_full();
        if self.raft_status.needs_no_round(view.applied_term, view.applied_index) {
            return Ok(view);
        }
        let deadline = Instant::now() + self.settings.request_timeout;
        let read = async {
            let permit = self.reads.enter(1).await;
            let (reply, answer) = Reply::new(runtime);
            if self.raft.try_send(Input::Read(ReadRequest { reply, deadline, permit })).is_err() {
                return Err(Error::Stopped);
            }
            match answer.await.unwrap_or(Err(Error::Stopped))? {
                Response::ReadIndex(index) => Ok(self.view.until(|view| view.applied_index >= index).await),
                other => unreachable!("raft answers a read with an index, not {other:?}"),
            }
        };
        let began = Instant::now();
        let view = tokio::time::timeout_at(deadline.into(), read).await.map_err(|_| Error::Timeout).flatten();
        if view.is_err() {
            self.metrics.reads_failed.fetch_add(1, Ordering::Relaxed);
        }
        if began.elapsed() > SLOW_READ {
            self.metrics.reads_slow.fetch_add(1, Ordering::Relaxed);
        }
        view
    }

    /// Reads from `view`, and from the newest one if clean-up has meanwhile taken rows that `view` still names.
    pub fn read<T>(
        &self,
        mut view: Arc<View>,
        read: impl Fn(&View) -> Result<T, mvcc::Error>,
    ) -> Result<(Arc<View>, T), mvcc::Error> {
        loop {
            match read(&view) {
                Err(mvcc::Error::ViewOutdated) => view = self.view.load_full(),
                done => return done.map(|found| (view, found)),
            }
        }
    }

    /// What HashKV answers, to clients and to other members, and the view that was current then.
    pub async fn hash_kv(self: &Arc<Self>, revision: i64) -> Result<(Arc<View>, HashKv), Error> {
        let server = self.clone();
        let scan = move || {
            let (began, view) = (Instant::now(), server.view.load_full());
            let is_kept = view.kv.hashes.at(revision).is_some();
            let found = server.read(view, |view| hash::hash_kv(&view.kv, &*server.storage, revision));
            if !is_kept && found.is_ok() {
                server.metrics.hashes_at_revision.record(began.elapsed());
            }
            found
        };
        Ok(tokio::task::spawn_blocking(scan).await.map_err(|e| Error::Storage(e.to_string()))??)
    }

    /// Refuses what costs space when there is none (M-16, G-15): before any other check.
    pub fn check_quota(self: &Arc<Self>, cost: u64, runtime: usize) -> Result<(), Error> {
        let Some(quota) = self.settings.quota_bytes else { return Ok(()) };
        if cost == 0 || self.view.load().kv.sizes.total + cost < quota {
            return Ok(());
        }
        self.ask_alarm(runtime);
        Err(Error::NoSpace)
    }

    /// Raises this member's NOSPACE alarm through raft, once at a time.
    pub fn ask_alarm(self: &Arc<Self>, runtime: usize) {
        use crate::pb::etcdserverpb::{AlarmRequest, AlarmType, alarm_request::AlarmAction};
        let kind = AlarmType::Nospace;
        let member_id = self.settings.member_id;
        let raised = self.view.load().alarms.list(kind as i32).iter().any(|a| a.member_id == member_id);
        if raised || self.alarm_asked.swap(true, Ordering::AcqRel) {
            return;
        }
        tracing::warn!(quota = self.settings.quota_bytes, "database space exceeded; raising the NOSPACE alarm");
        let server = self.clone();
        tokio::spawn(async move {
            let alarm = AlarmRequest { action: AlarmAction::Activate as i32, member_id, alarm: kind as i32 };
            let request = InternalRaftRequest { alarm: Some(alarm), ..Default::default() };
            if let Err(e) = server.propose(request, runtime).await {
                tracing::warn!("the NOSPACE alarm could not be raised: {e}; the next refused write tries again");
            }
            server.alarm_asked.store(false, Ordering::Release);
        });
    }

    /// Puts a request into the log and waits until it is applied here.
    pub async fn propose(&self, request: InternalRaftRequest, runtime: usize) -> Result<Response, Error> {
        self.propose_as(request, None, runtime).await
    }

    /// As [`Self::propose`]; with a term only while this member leads in it, so that what a leader decides by its own
    /// clock never outlives its leadership (H-40).
    pub async fn propose_as(
        &self,
        mut request: InternalRaftRequest,
        as_leader_of: Option<u64>,
        runtime: usize,
    ) -> Result<Response, Error> {
        let encode = |request: &InternalRaftRequest, _| request.encode_to_vec();
        self.propose_encoded(&mut request, encode, as_leader_of, runtime).await
    }

    /// As [`Self::propose_as`], in the form that members of the release `oldest` understand.
    pub async fn propose_for(
        &self,
        mut request: InternalRaftRequest,
        oldest: Version,
        as_leader_of: Option<u64>,
        runtime: usize,
    ) -> Result<Response, Error> {
        let encode = |request: &InternalRaftRequest, id| {
            v2_request::write(request, oldest, id).unwrap_or_else(|| request.encode_to_vec())
        };
        self.propose_encoded(&mut request, encode, as_leader_of, runtime).await
    }

    async fn propose_encoded(
        &self,
        request: &mut InternalRaftRequest,
        encode: impl FnOnce(&InternalRaftRequest, u64) -> Vec<u8>,
        as_leader_of: Option<u64>,
        runtime: usize,
    ) -> Result<Response, Error> {
        let (kind, began) = (Kind::of(request), Instant::now());
        let id = self.next_id();
        request.header = Some(RequestHeader { id, ..Default::default() });
        let data = Bytes::from(encode(request, id));
        let outcome = if data.len() > self.settings.max_request_bytes {
            Err(Error::RequestTooLarge)
        } else {
            self.propose_entry(id, data, Box::new(std::mem::take(request)), false, as_leader_of, runtime).await
        };
        self.metrics.requests.record(kind, outcome.is_ok(), began.elapsed());
        outcome
    }

    async fn propose_entry(
        &self,
        id: u64,
        data: Bytes,
        request: Box<InternalRaftRequest>,
        conf_change: bool,
        as_leader_of: Option<u64>,
        runtime: usize,
    ) -> Result<Response, Error> {
        let began = Instant::now();
        let deadline = began + self.settings.request_timeout;
        let permit = match self.gate.try_enter(data.len()) {
            Some(permit) => permit,
            // In arrival order; whoever is still outside at its deadline has done nothing (D-16).
            None => tokio::time::timeout_at(deadline.into(), self.gate.enter(data.len()))
                .await
                .map_err(|_| Error::DeadlineExceeded)?,
        };
        let (reply, answer) = Reply::new(runtime);
        let ticket = Ticket { request, reply, deadline, permit };
        if self.raft.try_send(Input::Propose(Proposal { data, conf_change, id, as_leader_of, ticket })).is_err() {
            // The gate is smaller than the lane, so only a stopped actor refuses.
            return Err(Error::Stopped);
        }
        match answer.await.unwrap_or(Err(apply::Error::Stopped)) {
            Err(Error::Timeout) => Err(self.explain_timeout(began)),
            outcome => outcome,
        }
    }

    /// What a proposal that came to nothing may have suffered from (D-17).
    fn explain_timeout(&self, began: Instant) -> Error {
        let found = self.raft_status.leader_since();
        let leader = self.raft_status.read().leader;
        if let Some(found) = found.filter(|found| began < *found)
            && began + 2 * self.settings.election_timeout > found
        {
            return Error::TimeoutLeaderFailed;
        }
        let is_connected = |id| self.connected_since(id).is_some_and(|since| since <= began);
        let lost = if leader == self.settings.member_id {
            let view = self.view.load();
            let voters = view.members.iter().filter(|member| !member.is_learner);
            let (all, connected) = voters.fold((0, 0), |(all, connected), member| {
                (all + 1, connected + usize::from(member.id == leader || is_connected(member.id)))
            });
            connected < all / 2 + 1
        } else {
            leader != 0 && !is_connected(leader)
        };
        if lost { Error::TimeoutConnectionLost } else { Error::Timeout }
    }
}
