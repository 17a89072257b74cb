//! The Maintenance service.

use std::{
    pin::Pin,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Request, Response, Status};

use super::{Handle, kv::OTHER_KIND, status};
use crate::{
    apply::{self, Error},
    cluster::Version,
    config::ETCD_VERSION,
    mvcc::hash,
    pb::etcdserverpb::{
        AlarmRequest, AlarmResponse, AlarmType, DefragmentRequest, DefragmentResponse, DowngradeInfo, DowngradeRequest,
        DowngradeResponse, HashKvRequest, HashKvResponse, HashRequest, HashResponse, InternalRaftRequest,
        MoveLeaderRequest, MoveLeaderResponse, SnapshotRequest, SnapshotResponse, StatusRequest, StatusResponse,
        alarm_request::AlarmAction, downgrade_request::DowngradeAction, maintenance_server::Maintenance,
    },
    pb::membershippb::DowngradeInfoSetRequest,
    raft,
    snapshot::{
        self,
        backup::{self, Part},
    },
    telemetry::{Metrics, Numbers},
};

/// Backups at the same time; more wait. Each is a thread and a hold on old rows.
static BACKUPS: Semaphore = Semaphore::const_new(32);
/// After so long without progress a backup loses its place, if all are taken: who stalls must not keep others out.
const STALLED: Duration = Duration::from_secs(60);
/// Parts of a backup, 32 KiB each, that wait for their client.
const PARTS_AHEAD: usize = 4;

/// Counts something that is under way, until it is dropped.
struct Running(Metrics, fn(&Numbers) -> &AtomicU64);

impl Running {
    fn start(metrics: Metrics, of: fn(&Numbers) -> &AtomicU64) -> Self {
        of(&metrics).fetch_add(1, Relaxed);
        Self(metrics, of)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        (self.1)(&self.0).fetch_sub(1, Relaxed);
    }
}

type Answer = Result<SnapshotResponse, Status>;

/// The client of a backup, as its thread sees it.
struct Parts {
    to: mpsc::Sender<Answer>,
    /// Room for the last word: without it a backup that broke off would end as if it were complete.
    last: Option<mpsc::OwnedPermit<Answer>>,
    places: &'static Semaphore,
    patience: Duration,
    runtime: tokio::runtime::Handle,
}

impl Parts {
    fn new(places: &'static Semaphore, patience: Duration) -> (Self, mpsc::Receiver<Answer>) {
        let (to, parts) = mpsc::channel(PARTS_AHEAD + 1);
        let last = to.clone().try_reserve_owned().ok();
        (Self { to, last, places, patience, runtime: tokio::runtime::Handle::current() }, parts)
    }

    fn break_off(&mut self, status: Status) {
        if let Some(last) = self.last.take() {
            last.send(Err(status));
        }
    }

    /// Waits for room. False: the client is gone, or takes nothing while others wait for its place.
    async fn send(&mut self, response: SnapshotResponse) -> bool {
        loop {
            match tokio::time::timeout(self.patience, self.to.reserve()).await {
                Ok(room) => return room.map(|room| room.send(Ok(response))).is_ok(),
                Err(_) if self.places.available_permits() > 0 => {}
                Err(_) => break,
            }
        }
        tracing::warn!(stalled = ?self.patience, "a backup was ended: its client takes nothing, and all places are taken");
        self.break_off(Status::aborted("the backup made no progress while others waited"));
        false
    }
}

impl backup::Receiver for Parts {
    fn is_there(&self) -> bool {
        !self.to.is_closed()
    }

    fn take(&mut self, Part { blob, remaining_bytes, version }: Part) -> bool {
        // M-33: no header.
        let response = SnapshotResponse { header: None, remaining_bytes, blob, version };
        self.runtime.clone().block_on(self.send(response))
    }
}

impl Drop for Parts {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.break_off(Status::internal("the backup broke off"));
        }
    }
}

/// Quota shown when none is configured.
const DEFAULT_QUOTA: i64 = 2 << 30;

impl Handle {
    /// The version a downgrade may go to, if it is this one (C-38, C-39).
    async fn downgrade_target(&self, text: &str) -> Result<Version, Status> {
        let whole = if text.split('.').count() == 2 { format!("{text}.0") } else { text.to_owned() };
        let target: Version = whole.parse().map_err(|_| status::bad_downgrade_format())?;
        let target = target.cluster_version();
        let view = self.server.linearizable_view(self.runtime).await?;
        let current = view.members.cluster_version().ok_or_else(status::no_cluster_version)?;
        if !target.is_one_minor_below(current) {
            return Err(status::bad_downgrade_target());
        }
        if view.members.downgrade().enabled {
            return Err(status::downgrade_in_process());
        }
        Ok(target)
    }

    async fn set_downgrade(&self, target: Option<Version>) -> Result<(), Error> {
        let ver = target.map_or_else(String::new, |version| version.to_string());
        let job = DowngradeInfoSetRequest { enabled: target.is_some(), ver };
        let request = InternalRaftRequest { downgrade_info_set: Some(job), ..Default::default() };
        self.server.propose(request, self.runtime).await.map(|_| ())
    }
}

#[tonic::async_trait]
impl Maintenance for Handle {
    async fn alarm(&self, request: Request<AlarmRequest>) -> Result<Response<AlarmResponse>, Status> {
        let req = request.into_inner();
        if AlarmAction::try_from(req.action).is_err() {
            return Err(Error::AlarmAction(req.action).into()); // M-9
        }
        let request = InternalRaftRequest { alarm: Some(req), ..Default::default() };
        match self.server.propose(request, self.runtime).await? {
            apply::Response::Alarm(mut response) => {
                self.server.complete(&mut response.header);
                Ok(Response::new(response))
            }
            other => unreachable!("{OTHER_KIND}: {other:?}"),
        }
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let view = self.server.view.load_full();
        let raft = self.server.raft_status.read();
        let mut errors = Vec::new();
        if raft.leader == 0 {
            errors.push("etcdserver: no leader".to_owned());
        }
        for alarm in view.alarms.list(AlarmType::None as i32) {
            let kind = AlarmType::try_from(alarm.alarm).map_or("UNKNOWN", |kind| kind.as_str_name());
            errors.push(format!("memberID:{} alarm:{kind}", alarm.member_id));
        }
        let downgrade = view.members.downgrade();
        let configured = self.server.settings.quota_configured;
        Ok(Response::new(StatusResponse {
            header: Some(self.server.header_of(&view)),
            version: ETCD_VERSION.to_owned(),
            db_size: view.kv.sizes.total.cast_signed(),
            db_size_in_use: view.kv.sizes.in_use.cast_signed(),
            leader: raft.leader,
            raft_index: raft.commit.max(view.applied_index),
            raft_term: raft.term,
            raft_applied_index: view.applied_index,
            errors,
            is_learner: raft.is_learner,
            storage_version: view.members.storage_version().map_or_else(String::new, |v| v.to_string()),
            db_size_quota: if configured == 0 { DEFAULT_QUOTA } else { configured },
            downgrade_info: Some(DowngradeInfo {
                enabled: downgrade.enabled,
                target_version: downgrade.target_version.clone(),
            }),
        }))
    }

    async fn defragment(&self, _: Request<DefragmentRequest>) -> Result<Response<DefragmentResponse>, Status> {
        let (began, metrics) = (Instant::now(), &self.server.metrics);
        let _running = Running::start(self.server.metrics.clone(), |m| &m.defragments_running);
        let (done, wait) = oneshot::channel();
        if !self.server.apply.control(apply::Control::Defragment(done)) || wait.await.is_err() {
            return Err(Error::Stopped.into());
        }
        metrics.defragments.record(began.elapsed());
        // Space on disk follows in the background and blocks nobody.
        let storage = self.server.storage.clone();
        tokio::task::spawn_blocking(move || {
            if let Err(e) = storage.load().major_compact() {
                tracing::warn!("the background part of defragmentation failed: {e}; the store goes on as it is");
            }
        });
        Ok(Response::new(DefragmentResponse { header: None }))
    }

    async fn hash(&self, _: Request<HashRequest>) -> Result<Response<HashResponse>, Status> {
        let (server, began) = (self.server.clone(), Instant::now());
        let hash = tokio::task::spawn_blocking(move || hash::hash_all(&*server.storage))
            .await
            .map_err(|e| Status::internal(e.to_string()))?
            .map_err(Error::from)?;
        self.server.metrics.hashes.record(began.elapsed());
        let header = Some(self.server.header_of(&self.server.view.load()));
        Ok(Response::new(HashResponse { header, hash }))
    }

    async fn hash_kv(&self, request: Request<HashKvRequest>) -> Result<Response<HashKvResponse>, Status> {
        let (view, found) = self.server.hash_kv(request.into_inner().revision).await?;
        Ok(Response::new(HashKvResponse {
            header: Some(self.server.header_of(&view)),
            hash: found.hash,
            compact_revision: found.compact_revision,
            hash_revision: found.hash_revision,
        }))
    }

    type SnapshotStream = Pin<Box<dyn Stream<Item = Result<SnapshotResponse, Status>> + Send>>;

    async fn snapshot(&self, _: Request<SnapshotRequest>) -> Result<Response<Self::SnapshotStream>, Status> {
        let slot = BACKUPS.acquire().await.map_err(|_| Error::Stopped)?;
        let (mut to, parts) = Parts::new(&BACKUPS, STALLED);
        let server = self.server.clone();
        // A client that goes away closes the channel, and the next look at it ends the thread, and with it the hold
        // on the engine's old rows.
        let run = move || {
            let _slot = slot;
            let _running = Running::start(server.metrics.clone(), |m| &m.backups_running);
            let began = Instant::now();
            match backup::send(&*server.storage, &mut to) {
                Ok(()) => server.metrics.backups.record(began.elapsed()),
                Err(snapshot::Error::Gone) => tracing::info!("a backup was ended by its client"),
                Err(e) => {
                    tracing::warn!("a backup failed: {e}");
                    to.break_off(Status::internal(e.to_string()));
                }
            }
        };
        let thread = std::thread::Builder::new().name("backup".to_owned()).spawn(run);
        thread.map_err(|e| Status::resource_exhausted(format!("no thread for a backup: {e}")))?;
        Ok(Response::new(Box::pin(ReceiverStream::new(parts))))
    }

    async fn move_leader(&self, request: Request<MoveLeaderRequest>) -> Result<Response<MoveLeaderResponse>, Status> {
        let raft = self.server.raft_status.read();
        if !raft.is_leader {
            return Err(status::not_leader());
        }
        let target = request.into_inner().target_id;
        let view = self.server.view.load();
        if view.members.get(target).is_none_or(|m| m.is_learner) {
            return Err(status::bad_transferee());
        }
        if target == self.server.settings.member_id {
            return Ok(Response::new(MoveLeaderResponse { header: None }));
        }
        self.server.raft.control(raft::Control::Transfer { to: target });
        // As long as the caller waits (M-39).
        self.server.raft_status.until(|now| now.leader == target).await;
        Ok(Response::new(MoveLeaderResponse { header: None }))
    }

    async fn downgrade(&self, request: Request<DowngradeRequest>) -> Result<Response<DowngradeResponse>, Status> {
        let req = request.into_inner();
        let action = DowngradeAction::try_from(req.action).map_err(|_| status::unknown_method())?;
        if action == DowngradeAction::Cancel {
            // Also without a job (C-40).
            self.set_downgrade(None).await?;
        } else {
            let target = self.downgrade_target(&req.version).await?;
            if action == DowngradeAction::Enable {
                self.set_downgrade(Some(target)).await?;
            }
        }
        let view = self.server.view.load_full();
        let version = view.members.cluster_version().map_or_else(String::new, |v| format!("{}.{}", v.major, v.minor));
        Ok(Response::new(DowngradeResponse { header: Some(self.server.header_of(&view)), version }))
    }
}

#[cfg(test)]
mod tests {
    use super::{backup::Receiver, *};

    const PATIENCE: Duration = Duration::from_millis(50);

    fn part(remaining_bytes: u64) -> Part {
        Part { remaining_bytes, blob: bytes::Bytes::new(), version: String::new() }
    }

    #[tokio::test]
    async fn a_stalled_backup_loses_its_place_and_says_so() {
        static NONE_FREE: Semaphore = Semaphore::const_new(0);
        let (mut to, mut parts) = Parts::new(&NONE_FREE, PATIENCE);
        let taken = std::thread::spawn(move || (0..100).take_while(|&n| to.take(part(n))).count());
        while !taken.is_finished() {
            tokio::task::yield_now().await;
        }
        assert_eq!(taken.join().expect("no panic"), PARTS_AHEAD);
        for n in 0..PARTS_AHEAD {
            assert_eq!(parts.recv().await.expect("a part").expect("in order").remaining_bytes, n as u64);
        }
        let end = parts.recv().await.expect("the last word").expect_err("not as if it were complete");
        assert_eq!(end.code(), tonic::Code::Aborted);
        assert!(parts.recv().await.is_none());
    }

    #[tokio::test]
    async fn a_slow_backup_goes_on_while_there_are_places() {
        static ONE_FREE: Semaphore = Semaphore::const_new(1);
        let (mut to, mut parts) = Parts::new(&ONE_FREE, PATIENCE);
        let taken = std::thread::spawn(move || (0..10).take_while(|&n| to.take(part(n))).count());
        tokio::time::sleep(4 * PATIENCE).await;
        assert!(!taken.is_finished(), "it waits");
        for _ in 0..10 {
            parts.recv().await.expect("a part").expect("no error");
        }
        assert!(parts.recv().await.is_none());
        assert_eq!(taken.join().expect("no panic"), 10);
    }
}
