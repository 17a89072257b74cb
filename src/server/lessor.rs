//! What the lease expirer needs of the rest of the member: proposals, leadership, ticks.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};
use std::time::{Duration, Instant};

use crate::{
    api::Server,
    apply::{Error, LeaseNotice},
    lease::actor::{self, Control},
    pb::etcdserverpb::{InternalRaftRequest, LeaseCheckpoint, LeaseCheckpointRequest, LeaseRevokeRequest},
};

/// Carries the expirer's wishes to raft.
pub struct Proposer {
    server: Arc<Server>,
    runtime: usize,
    tokio: tokio::runtime::Handle,
}

impl Proposer {
    pub fn new(server: Arc<Server>, runtime: usize, tokio: tokio::runtime::Handle) -> Self {
        Self { server, runtime, tokio }
    }
}

impl actor::Proposer for Proposer {
    fn revoke(&mut self, id: i64, term: u64) {
        let (server, runtime) = (self.server.clone(), self.runtime);
        self.tokio.spawn(async move {
            let request = InternalRaftRequest { lease_revoke: Some(LeaseRevokeRequest { id }), ..Default::default() };
            match server.propose_as(request, Some(term), runtime).await {
                // Gone already: apply has no notice of it to give.
                Err(Error::LeaseNotFound) => {
                    server.leases.control(Control::Notices(vec![LeaseNotice::Gone { id }]));
                }
                // The expirer tries again when the request timeout is over.
                Err(e) => tracing::debug!(lease = id, "a lease that ran out could not be revoked yet: {e}"),
                Ok(_) => {
                    server.metrics.leases_expired.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
    }

    fn checkpoint(&mut self, checkpoints: Vec<LeaseCheckpoint>, term: u64) {
        let (server, runtime) = (self.server.clone(), self.runtime);
        self.tokio.spawn(async move {
            let lease_checkpoint = Some(LeaseCheckpointRequest { checkpoints });
            let request = InternalRaftRequest { lease_checkpoint, ..Default::default() };
            if let Err(e) = server.propose_as(request, Some(term), runtime).await {
                tracing::debug!("lease checkpoints could not be written: {e}");
            }
        });
    }
}

/// Starts the deadlines when this member leads and has applied everything committed before (L-25).
pub async fn follow_leadership(server: Arc<Server>) {
    loop {
        let led = server.raft_status.until(|now| now.is_leader).await;
        server.view.until(|view| view.applied_term >= led.term).await;
        server.leases.control(Control::Leader { term: led.term });
        server.raft_status.until(|now| !now.is_leader || now.term != led.term).await;
        server.leases.control(Control::Demoted);
    }
}

/// How often deadlines are looked at.
const RESOLUTION: Duration = Duration::from_millis(50);

/// Wakes the expirer when a deadline has come.
pub async fn tick(server: Arc<Server>, next_ms: Arc<AtomicU64>) {
    let start = Instant::now();
    let mut every = super::ticks(RESOLUTION);
    loop {
        every.tick().await;
        // The actor began a little later than this clock: its deadlines come a little later, never earlier.
        if next_ms.load(Ordering::Relaxed) <= start.elapsed().as_millis() as u64 {
            server.leases.control(Control::Tick);
        }
    }
}
