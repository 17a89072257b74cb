//! The Lease service.

use std::pin::Pin;
use std::sync::{Arc, atomic::Ordering};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming};

use super::{Handle, Server, kv::OTHER_KIND, status};
use crate::{
    apply::{self, Error, View},
    lease::actor::{Ask, Renewed},
    pb::etcdserverpb::{
        InternalRaftRequest, LeaseCheckpoint, LeaseCheckpointRequest, LeaseGrantRequest, LeaseGrantResponse,
        LeaseKeepAliveRequest, LeaseKeepAliveResponse, LeaseLeasesRequest, LeaseLeasesResponse, LeaseRevokeRequest,
        LeaseRevokeResponse, LeaseStatus, LeaseTimeToLiveRequest, LeaseTimeToLiveResponse, lease_server::Lease,
    },
    peer::client,
};

/// Cost of a grant towards the quota (M-16).
const GRANT_COST: u64 = 64;
/// How long a call waits for this member to apply what it needs (limits: 1 s).
const APPLY_WAIT: Duration = Duration::from_secs(1);
/// Between two tries of a renewal that met a member without leadership.
const RETRY: Duration = Duration::from_millis(50);
/// Between two questions to the expirer about a lease that has just been granted.
const RETRY_REMAINING: Duration = Duration::from_millis(5);

/// What became of one try to renew a lease on this member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Renewal {
    /// It has its full time again.
    Ttl(i64),
    Gone,
    /// Deadlines are kept by the leader alone (L-10).
    NotLeader,
    /// The news of its grant, or of the leadership, is on the way to the expirer (H-38): to be tried again.
    Later,
}

impl Server {
    /// Renews a lease, if this member leads.
    pub async fn renew(&self, id: i64, runtime: usize) -> Result<Renewal, Error> {
        // What another member has acknowledged must be known here (H-38, H-41). An applier that is late for long keeps
        // nobody from renewing a lease that is known.
        let applied = if self.raft_status.read().is_leader { self.applied().await } else { Ok(()) };
        if !self.settings.fast_lease_keep_alive {
            applied.clone()?;
        }
        let (answer, renewed) = oneshot::channel();
        let renewed = match self.leases.try_send(Ask::Renew { id, answer }) {
            Ok(()) => renewed.await.ok(),
            Err(_) => None,
        };
        // After the renewal, so that no pause comes between the two unseen. Of a lease that is not known here another leader
        // may know, and a client that hears that it is gone gives up.
        let is_strange = matches!(renewed, Some(Renewed::Unknown)) && !self.view.load().leases.contains(id);
        if !matches!(renewed, Some(Renewed::NotLeader) | None) && !self.confirm_leadership(is_strange, runtime).await? {
            return Ok(Renewal::Later);
        }
        Ok(match renewed {
            Some(Renewed::Ttl { ttl, clear_checkpoint }) => {
                if clear_checkpoint {
                    let checkpoints = vec![LeaseCheckpoint { id, remaining_ttl: 0 }];
                    let lease_checkpoint = Some(LeaseCheckpointRequest { checkpoints });
                    let request = InternalRaftRequest { lease_checkpoint, ..Default::default() };
                    self.propose(request, runtime).await?;
                }
                self.metrics.leases_renewed.fetch_add(1, Ordering::Relaxed);
                // After the renewal: a revocation applied before it shows here (H-41).
                if self.view.load().leases.contains(id) { Renewal::Ttl(ttl) } else { Renewal::Gone }
            }
            Some(Renewed::Gone) => Renewal::Gone,
            Some(Renewed::Unknown) if !self.view.load().leases.contains(id) => applied.map(|()| Renewal::Gone)?,
            Some(Renewed::NotLeader) if !self.raft_status.read().is_leader => Renewal::NotLeader,
            Some(Renewed::Unknown | Renewed::NotLeader) | None => Renewal::Later,
        })
    }

    /// Waits until this member has applied what it knows to be committed.
    pub async fn applied(&self) -> Result<(), Error> {
        let commit = self.raft_status.read().commit;
        if self.view.load().applied_index >= commit {
            return Ok(());
        }
        let applied = self.view.until(|view| view.applied_index >= commit);
        tokio::time::timeout(APPLY_WAIT, applied).await.map(drop).map_err(|_| Error::TimeoutAppliedIndex)
    }

    /// What a lease has left, if this member leads: a view, and in it the seconds left and those granted.
    pub async fn time_left(&self, id: i64) -> Result<(Arc<View>, Option<(i64, i64)>), Error> {
        self.applied().await?;
        let deadline = Instant::now() + APPLY_WAIT;
        loop {
            if !self.raft_status.read().is_leader {
                return Err(Error::NotPrimaryLessor);
            }
            let (answer, remaining) = oneshot::channel();
            let remaining = match self.leases.try_send(Ask::Remaining { id, answer }) {
                Ok(()) => remaining.await.ok().flatten(),
                Err(_) => None,
            };
            let view = self.view.load_full();
            let Some(granted) = view.leases.ttl(id) else { return Ok((view, None)) };
            if let Some(ms) = remaining {
                return Ok((view, Some((ms.div_euclid(1000), granted))));
            }
            // In the view, but its deadline is not set yet: just granted, or this member has just become leader.
            if Instant::now() >= deadline {
                return Err(Error::TimeoutAppliedIndex);
            }
            tokio::time::sleep(RETRY_REMAINING).await;
        }
    }

    /// Whether this member leads. One that stood still may have been replaced without knowing it: it asks the others,
    /// once after each pause (L-11), or in any case.
    async fn confirm_leadership(&self, in_any_case: bool, runtime: usize) -> Result<bool, Error> {
        let (raft, pauses) = (self.raft_status.read(), self.raft_status.pauses(Instant::now()));
        let is_known = !in_any_case && pauses == Some(self.confirmed_pauses.load(Ordering::Relaxed));
        if !raft.is_leader || raft.is_alone || is_known {
            return Ok(raft.is_leader);
        }
        self.linearizable_view(runtime).await.map_err(|_| Error::NotPrimaryLessor)?;
        // Another leader may have answered.
        let now = self.raft_status.read();
        let leads = now.is_leader && now.term == raft.term;
        if leads && let Some(pauses) = pauses {
            self.confirmed_pauses.store(pauses, Ordering::Relaxed);
        }
        Ok(leads)
    }
}

impl Handle {
    /// The full time again, or 0 if there is no such lease.
    async fn renew(&self, id: i64) -> Result<i64, Error> {
        let deadline = tokio::time::Instant::now() + self.server.settings.request_timeout;
        loop {
            let raft = self.server.raft_status.read();
            if raft.leader != 0
                && !raft.is_leader
                && let Some(ttl) = self.renew_at_leader(id, deadline).await
            {
                return Ok(ttl);
            }
            let renewal = tokio::time::timeout_at(deadline, self.server.renew(id, self.runtime)).await;
            match renewal.map_err(|_| Error::Timeout)?? {
                Renewal::Ttl(ttl) => return Ok(ttl),
                Renewal::Gone => return Ok(0),
                Renewal::NotLeader | Renewal::Later => {}
            }
            if tokio::time::Instant::now() + RETRY >= deadline {
                let leader = self.server.raft_status.read().leader;
                return Err(if leader == 0 { Error::NoLeader } else { Error::Timeout });
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// `None`: the leader could not be asked; try again.
    async fn renew_at_leader(&self, id: i64, deadline: tokio::time::Instant) -> Option<i64> {
        for url in self.server.leader_urls() {
            match client::renew_lease(&url, id, left(deadline)).await {
                Ok(ttl) => return Some(ttl),
                Err(client::Error::Refused { status: 404, .. }) => return Some(0),
                Err(e) => tracing::debug!("a lease's renewal could not be forwarded: {e}"),
            }
        }
        None
    }

    /// Asks the leader for a lease's time (L-23).
    async fn time_at_leader(&self, id: i64, keys: bool) -> Result<LeaseTimeToLiveResponse, Error> {
        let deadline = tokio::time::Instant::now() + self.server.settings.request_timeout;
        loop {
            for url in self.server.leader_urls() {
                match client::lease_time_to_live(&url, id, keys, left(deadline)).await {
                    Ok(mut response) => {
                        response.header = Some(self.server.header_of(&self.server.view.load()));
                        return Ok(response);
                    }
                    Err(client::Error::Refused { status: 404, .. }) => {
                        let header = Some(self.server.header_of(&self.server.view.load()));
                        return Ok(LeaseTimeToLiveResponse { header, id, ttl: -1, ..Default::default() });
                    }
                    Err(client::Error::Refused { status: 500, .. }) => return Err(Error::LeaderChanged),
                    Err(e) => tracing::debug!("a question for a lease's time could not be forwarded: {e}"),
                }
            }
            if tokio::time::Instant::now() + RETRY >= deadline {
                let leader = self.server.raft_status.read().leader;
                return Err(if leader == 0 { Error::NoLeader } else { Error::Timeout });
            }
            tokio::time::sleep(RETRY).await;
        }
    }
}

fn left(deadline: tokio::time::Instant) -> Duration {
    deadline.saturating_duration_since(tokio::time::Instant::now())
}

#[tonic::async_trait]
impl Lease for Handle {
    async fn lease_grant(&self, request: Request<LeaseGrantRequest>) -> Result<Response<LeaseGrantResponse>, Status> {
        self.server.check_quota(GRANT_COST, self.runtime)?;
        let mut req = request.into_inner();
        while req.id == 0 {
            // A free positive id; apply refuses one that is taken meanwhile.
            let id = (self.server.next_id() & !(1 << 63)).cast_signed();
            if !self.server.view.load().leases.contains(id) {
                req.id = id;
            }
        }
        req.ttl = req.ttl.max(self.server.settings.min_lease_ttl);
        let request = InternalRaftRequest { lease_grant: Some(req), ..Default::default() };
        match self.server.propose(request, self.runtime).await? {
            apply::Response::LeaseGrant(mut response) => {
                self.server.complete(&mut response.header);
                Ok(Response::new(response))
            }
            other => unreachable!("{OTHER_KIND}: {other:?}"),
        }
    }

    async fn lease_revoke(
        &self,
        request: Request<LeaseRevokeRequest>,
    ) -> Result<Response<LeaseRevokeResponse>, Status> {
        let request = InternalRaftRequest { lease_revoke: Some(request.into_inner()), ..Default::default() };
        match self.server.propose(request, self.runtime).await? {
            apply::Response::LeaseRevoke(mut response) => {
                self.server.complete(&mut response.header);
                Ok(Response::new(response))
            }
            other => unreachable!("{OTHER_KIND}: {other:?}"),
        }
    }

    type LeaseKeepAliveStream = Pin<Box<dyn Stream<Item = Result<LeaseKeepAliveResponse, Status>> + Send>>;

    async fn lease_keep_alive(
        &self,
        request: Request<Streaming<LeaseKeepAliveRequest>>,
    ) -> Result<Response<Self::LeaseKeepAliveStream>, Status> {
        let handle = self.clone();
        let requests = request.into_inner();
        // One at a time, in order; the next request is read when the answer before it has been taken.
        let responses = futures_util::stream::unfold(Some(requests), move |requests| {
            let handle = handle.clone();
            async move {
                let mut requests = requests?;
                let req = match requests.message().await {
                    Ok(Some(req)) => req,
                    Ok(None) => return None,
                    Err(e) => {
                        // A client that is gone is none of the stream's failures.
                        if e.code() != tonic::Code::Cancelled && std::error::Error::source(&e).is_none() {
                            handle.server.metrics.streams_broken[1].fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        }
                        let max_request_bytes = handle.server.settings.max_request_bytes;
                        return Some((Err(status::of_stream(e, max_request_bytes)), None));
                    }
                };
                // The header is filled before the renewal (L-13).
                let header = Some(handle.server.header_of(&handle.server.view.load()));
                match handle.renew(req.id).await {
                    Ok(ttl) => Some((Ok(LeaseKeepAliveResponse { header, id: req.id, ttl }), Some(requests))),
                    Err(e) => Some((Err(e.into()), None)),
                }
            }
        });
        Ok(Response::new(Box::pin(responses)))
    }

    async fn lease_time_to_live(
        &self,
        request: Request<LeaseTimeToLiveRequest>,
    ) -> Result<Response<LeaseTimeToLiveResponse>, Status> {
        let req = request.into_inner();
        if !self.server.raft_status.read().is_leader {
            return Ok(Response::new(self.time_at_leader(req.id, req.keys).await?));
        }
        let (view, left) = self.server.time_left(req.id).await.map_err(|e| match e {
            Error::NotPrimaryLessor => Error::LeaderChanged,
            e => e,
        })?;
        let header = Some(self.server.header_of(&view));
        let Some((ttl, granted_ttl)) = left else {
            let response = LeaseTimeToLiveResponse { header, id: req.id, ttl: -1, ..Default::default() };
            return Ok(Response::new(response));
        };
        let keys =
            if req.keys { view.leases.keys(req.id).map(bytes::Bytes::copy_from_slice).collect() } else { Vec::new() };
        Ok(Response::new(LeaseTimeToLiveResponse { header, id: req.id, ttl, granted_ttl, keys }))
    }

    async fn lease_leases(&self, _: Request<LeaseLeasesRequest>) -> Result<Response<LeaseLeasesResponse>, Status> {
        let (answer, ordered) = oneshot::channel();
        let ordered = match self.server.leases.try_send(Ask::List { answer }) {
            Ok(()) => ordered.await.unwrap_or_default(),
            Err(_) => Vec::new(),
        };
        let view = self.server.view.load_full();
        let ids = if ordered.is_empty() { view.leases.ids().collect() } else { ordered };
        let leases = ids.into_iter().filter(|id| view.leases.contains(*id)).map(|id| LeaseStatus { id }).collect();
        Ok(Response::new(LeaseLeasesResponse { header: Some(self.server.header_of(&view)), leases }))
    }
}
