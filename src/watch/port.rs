//! How apply and the RPC handlers reach a hub: queues, no state.
//!
//! apply → hub: bounded; when full the message is left out, and the hub sees from the next one that its revision
//! jumped and puts its watchers behind. apply never waits. A hub without streams is told nothing at all.
//! handler → hub: within one thread; bounded by one request per stream.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use tokio::sync::{mpsc, oneshot};
use tonic::Status;

use super::Published;
use crate::pb::etcdserverpb::{WatchRequest, WatchResponse};

/// Views a hub may lag before messages are left out: at 1 ms a batch, a quarter of a second.
pub const PUBLISHED_MAX: usize = 256;

/// apply's end.
#[derive(Clone, Debug)]
pub struct Port {
    active: Arc<AtomicBool>,
    published: flume::Sender<Published>,
    pub skipped: Arc<AtomicU64>,
}

impl Port {
    /// Whether the hub has streams. A stream that opens sets this before it looks at the view, and apply looks here
    /// after it published: one of the two sees the other.
    pub fn is_active(&self) -> bool {
        self.active.load(Ordering::SeqCst)
    }

    pub fn publish(&self, published: Published) {
        if let Err(full) = self.published.try_send(published) {
            // The hub looks at the newest view when it has drained what is queued.
            self.skipped.fetch_add(1, Ordering::SeqCst);
            // It may have drained all before it could see that: then this message wakes it.
            let _ = self.published.try_send(full.into_inner());
        }
    }
}

/// What a handler asks of the hub of its thread.
#[derive(Debug)]
pub(super) enum Ask {
    Open {
        responses: mpsc::UnboundedSender<Result<Queued, Status>>,
        opened: oneshot::Sender<super::StreamId>,
    },
    Request {
        stream: super::StreamId,
        request: WatchRequest,
        denied: Option<String>,
        /// Answered when the next request may be read.
        go_on: oneshot::Sender<()>,
    },
    Taken {
        stream: super::StreamId,
        bytes: usize,
    },
    Close {
        stream: super::StreamId,
    },
}

/// A response with its encoded size.
#[derive(Debug)]
pub(super) struct Queued {
    pub response: WatchResponse,
    pub bytes: usize,
}

/// The handlers' end.
#[derive(Clone, Debug)]
pub struct Client {
    pub(super) asks: flume::Sender<Ask>,
    pub(super) report_bytes: usize,
}

/// The hub's ends.
#[derive(Debug)]
pub struct Ends {
    pub(super) active: Arc<AtomicBool>,
    pub(super) skipped: Arc<AtomicU64>,
    pub(super) published: flume::Receiver<Published>,
    pub(super) asks: flume::Receiver<Ask>,
}

impl Ends {
    pub fn has_published(&self) -> bool {
        !self.published.is_empty()
    }

    pub fn try_published(&self) -> Option<Published> {
        self.published.try_recv().ok()
    }

    /// Views so far that found the queue full.
    pub fn skipped(&self) -> u64 {
        self.skipped.load(Ordering::SeqCst)
    }

    /// IMPORTANT: set before the view is looked at for a first stream, see [`Port::is_active`].
    pub fn set_active(&self, active: bool) {
        self.active.store(active, Ordering::SeqCst);
    }
}

/// `stream_budget_bytes` as in the hub's config; `published_max`: views the hub may lag.
pub fn connect(stream_budget_bytes: usize, published_max: usize) -> (Port, Client, Ends) {
    let active = Arc::new(AtomicBool::new(false));
    let skipped = Arc::new(AtomicU64::new(0));
    let (published_tx, published) = flume::bounded(published_max);
    let (asks_tx, asks) = flume::unbounded();
    (
        Port { active: active.clone(), published: published_tx, skipped: skipped.clone() },
        // What a stream has taken but not told yet makes its queue look longer than it is, by a quarter at most.
        Client { asks: asks_tx, report_bytes: stream_budget_bytes / 4 },
        Ends { active, skipped, published, asks },
    )
}
