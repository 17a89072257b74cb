//! The hub's shell: one task on its RPC runtime's thread.

use std::{
    collections::HashMap,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use tokio::sync::{mpsc, oneshot};
use tonic::Status;

use super::{
    Hub, HubConfig, Outgoing, Published, StoreHistory, StreamId,
    port::{Ask, Client, Ends, Queued},
};
use crate::{
    apply::ViewCell,
    pb::etcdserverpb::{WatchRequest, WatchResponse},
    storage::{self, Storage},
};

/// Catch-up work between two looks at the queues.
const TURN: Duration = Duration::from_micros(500);

struct Shell {
    hub: Hub,
    history: StoreHistory,
    streams: HashMap<StreamId, mpsc::UnboundedSender<Result<Queued, Status>>>,
    /// Readers that wait until their stream takes requests again.
    held: HashMap<StreamId, oneshot::Sender<()>>,
    out: Vec<Outgoing>,
    ends: Ends,
    skipped_seen: u64,
    start: Instant,
}

/// Runs a hub until its clients are gone. Must run on the thread of the streams' runtime.
pub async fn run(
    config: HubConfig,
    seed: u64,
    ends: Ends,
    cell: ViewCell,
    storage: Arc<dyn Storage>,
    stats: impl Fn(&super::Stats),
) {
    let mut shell = Shell {
        hub: Hub::new(config, seed),
        history: StoreHistory::new(cell, storage),
        streams: HashMap::new(),
        held: HashMap::new(),
        out: Vec::new(),
        ends,
        skipped_seen: 0,
        start: Instant::now(),
    };
    let mut behind = false;
    loop {
        if shell.streams.is_empty() {
            shell.history.let_go();
        }
        let next_tick = shell.hub.next_tick().map(|ms| shell.start + Duration::from_millis(ms));
        let published = shell.ends.published.clone();
        let asks = shell.ends.asks.clone();
        tokio::select! {
            biased;
            message = published.recv_async() => match message {
                Ok(message) => {
                    shell.published(message);
                    while let Ok(message) = published.try_recv() {
                        shell.published(message);
                    }
                    shell.make_up_for_skipped();
                }
                Err(_) => return,
            },
            ask = asks.recv_async() => match ask {
                Ok(ask) => {
                    shell.ask(ask);
                    while let Ok(ask) = asks.try_recv() {
                        shell.ask(ask);
                    }
                }
                Err(_) => return,
            },
            () = sleep_until(next_tick), if next_tick.is_some() => {
                let now = shell.now_ms();
                shell.hub.on_tick(now, &mut shell.out);
                shell.forward();
            }
            () = tokio::task::yield_now(), if behind => {}
        }
        behind = !shell.streams.is_empty() && shell.catch_up();
        stats(&shell.hub.stats());
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

impl Shell {
    fn now_ms(&self) -> u64 {
        self.start.elapsed().as_millis() as u64
    }

    fn published(&mut self, message: Published) {
        self.history.refresh();
        if let Err(e) = self.hub.on_published(&message, &mut self.history, &mut self.out) {
            fatal(&e);
        }
        self.forward();
    }

    fn ask(&mut self, ask: Ask) {
        match ask {
            Ask::Open { responses, opened } => {
                self.ends.set_active(true);
                self.adopt_current_view();
                let stream = self.hub.open_stream(self.now_ms());
                self.streams.insert(stream, responses);
                if opened.send(stream).is_err() {
                    self.close(stream);
                }
            }
            Ask::Request { stream, request, denied, go_on } => {
                self.adopt_current_view();
                let view = self.history.current().clone();
                self.hub.on_request(stream, request, denied, &view, &mut self.out);
                self.forward();
                if self.hub.accepts_requests(stream) {
                    let _ = go_on.send(());
                } else {
                    self.held.insert(stream, go_on);
                }
            }
            Ask::Taken { stream, bytes } => {
                self.hub.on_taken(stream, bytes, &mut self.out);
                self.forward();
                if self.hub.accepts_requests(stream)
                    && let Some(go_on) = self.held.remove(&stream)
                {
                    let _ = go_on.send(());
                }
            }
            Ask::Close { stream } => self.close(stream),
        }
    }

    /// The hub hears nothing while it has no streams, and answers may be based on a view newer than its last message:
    /// it is told of that view as a jump. What the messages to come repeat, deliveries skip.
    fn adopt_current_view(&mut self) {
        self.history.refresh();
        if self.streams.is_empty() {
            self.jump_to_current_view();
        }
    }

    fn jump_to_current_view(&mut self) {
        if self.history.current().revision > self.hub.revision() {
            let raft_term = self.raft_term();
            self.published(Published { view: self.history.current().clone(), changes: Arc::from([]), raft_term });
        }
    }

    /// Views that found the queue full were left out; if they were the last ones, no message tells of them.
    fn make_up_for_skipped(&mut self) {
        let skipped = self.ends.skipped();
        if skipped != self.skipped_seen {
            self.skipped_seen = skipped;
            self.history.refresh();
            self.jump_to_current_view();
        }
    }

    fn raft_term(&self) -> u64 {
        self.history.cell.load().applied_term
    }

    fn close(&mut self, stream: StreamId) {
        self.hub.close_stream(stream);
        self.streams.remove(&stream);
        self.held.remove(&stream);
        if self.streams.is_empty() {
            self.ends.set_active(false);
        }
    }

    fn forward(&mut self) {
        for outgoing in self.out.drain(..) {
            if let Some(stream) = self.streams.get(&outgoing.stream) {
                // A stream whose client is gone is about to be closed.
                let _ = stream.send(Ok(Queued { response: outgoing.response, bytes: outgoing.bytes }));
            }
        }
    }

    /// Some history for watchers that are behind; true if there is more to do.
    fn catch_up(&mut self) -> bool {
        let until = Instant::now() + TURN;
        loop {
            match self.hub.catch_up(1, &mut self.history, &mut self.out) {
                Ok(more) => {
                    self.forward();
                    if !more || Instant::now() >= until {
                        return more;
                    }
                }
                Err(e) => fatal(&e),
            }
        }
    }
}

fn fatal(e: &storage::Error) -> ! {
    tracing::error!("cannot read the store for watchers: {e}; the process ends");
    std::process::exit(1)
}

/// A watch stream as the transport sees it.
pub struct Responses {
    queue: mpsc::UnboundedReceiver<Result<Queued, Status>>,
    untold: usize,
    stream: StreamId,
    client: Client,
}

impl Client {
    /// Opens a stream. `None` if the hub has ended.
    pub async fn open(&self) -> Option<(Requests, Responses)> {
        let (responses, queue) = mpsc::unbounded_channel();
        let (opened, id) = oneshot::channel();
        self.asks.send(Ask::Open { responses: responses.clone(), opened }).ok()?;
        let stream = id.await.ok()?;
        let requests = Requests { stream, client: self.clone(), responses };
        Some((requests, Responses { queue, untold: 0, stream, client: self.clone() }))
    }
}

/// The requests' side of a stream.
pub struct Requests {
    stream: StreamId,
    client: Client,
    responses: mpsc::UnboundedSender<Result<Queued, Status>>,
}

impl Requests {
    /// Hands over one request; comes back when the next may be read. False: the hub has ended.
    pub async fn send(&self, request: WatchRequest, denied: Option<String>) -> bool {
        let (go_on, wait) = oneshot::channel();
        let ask = Ask::Request { stream: self.stream, request, denied, go_on };
        self.client.asks.send(ask).is_ok() && wait.await.is_ok()
    }

    /// Ends the stream with a status.
    pub fn end(&self, status: Status) {
        let _ = self.responses.send(Err(status));
    }

    /// When the client has gone.
    pub async fn closed(&self) {
        self.responses.closed().await;
    }
}

impl tokio_stream::Stream for Responses {
    type Item = Result<WatchResponse, Status>;

    fn poll_next(mut self: std::pin::Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match self.queue.poll_recv(cx) {
            Poll::Ready(Some(Ok(queued))) => {
                self.untold += queued.bytes;
                if self.untold >= self.client.report_bytes {
                    let bytes = std::mem::take(&mut self.untold);
                    let _ = self.client.asks.send(Ask::Taken { stream: self.stream, bytes });
                }
                Poll::Ready(Some(Ok(queued.response)))
            }
            Poll::Ready(Some(Err(status))) => Poll::Ready(Some(Err(status))),
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl Drop for Responses {
    fn drop(&mut self) {
        let _ = self.client.asks.send(Ask::Close { stream: self.stream });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        apply::{Core, Settings, View},
        cluster::Version,
        storage::MemStorage,
        watch::connect,
    };

    #[tokio::test]
    async fn idle_hub_keeps_no_view() {
        let storage = Arc::new(MemStorage::default());
        let settings = Settings {
            member_id: 1,
            release: Version::new(3, 7, 1),
            min_lease_ttl: 2,
            max_learners: 1,
            persist_lease_checkpoints: false,
            quota_bytes: None,
        };
        let cell = ViewCell::new(Core::open(storage.clone(), settings).unwrap().view());
        let (_port, client, ends) = connect(1 << 20, super::super::PUBLISHED_MAX);
        let hub = run(HubConfig::default(), 1, ends, cell.clone(), storage, |_| {});
        // A new view is out, and nothing holds the one before it.
        let replaced = async |when: &str| {
            let old = Arc::downgrade(&cell.load().kv);
            let kv = Arc::new(crate::mvcc::View::clone(&cell.load().kv));
            cell.publish(Arc::new(View { kv, ..View::clone(&cell.load()) }));
            for _ in 0..100 {
                if old.upgrade().is_none() {
                    return;
                }
                tokio::task::yield_now().await;
            }
            panic!("a view is held {when}");
        };
        let test = async {
            tokio::task::yield_now().await;
            replaced("before the first stream").await;
            let (responses, _taken) = mpsc::unbounded_channel();
            let (opened, stream) = oneshot::channel();
            client.asks.send(Ask::Open { responses, opened }).unwrap();
            let stream = stream.await.unwrap();
            client.asks.send(Ask::Close { stream }).unwrap();
            replaced("behind the last stream").await;
        };
        tokio::select! {
            () = hub => panic!("the hub ended"),
            () = test => {}
        }
    }
}
