//! A member made of a transport and a listener, with raft and the snapshotter played by the test.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::Response;
use http_body_util::Full;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::mpsc,
};

use crate::{
    actor::Registry,
    cluster::Member,
    config::Url,
    pb::raftpb::{Entry, Message, MessageType, Snapshot, SnapshotMetadata},
    peer::{Bound, Chunks, Databases, Handler, Incoming, Links, Listening, Transport, Wiring},
};

pub const CLUSTER: u64 = 0xc1;

/// Runs a test where arbiters can be started.
pub fn run(test: impl Future<Output = ()>) {
    actix_rt::System::new().block_on(test);
}

/// What raft would be told.
#[derive(Default)]
pub struct Heard {
    pub messages: Mutex<Vec<Message>>,
    pub unreachable: Mutex<Vec<u64>>,
    pub snapshots_sent: Mutex<Vec<(u64, bool)>>,
    pub removed: Mutex<Vec<u64>>,
    pub removed_here: Mutex<u32>,
    /// Bytes, checksum and message of databases taken in.
    pub databases: Mutex<Vec<(u64, u32, Message)>>,
    /// Chunks and their size of databases to send.
    pub to_send: Mutex<(usize, usize)>,
    /// Chunks made so far.
    pub made: std::sync::atomic::AtomicU64,
    /// Nothing is taken in while this is set.
    pub holds: std::sync::atomic::AtomicBool,
}

impl Incoming for Heard {
    fn message(&self, message: Message) {
        self.messages.lock().unwrap().push(message);
    }

    fn unreachable(&self, id: u64) {
        self.unreachable.lock().unwrap().push(id);
    }

    fn snapshot_sent(&self, to: u64, delivered: bool) {
        self.snapshots_sent.lock().unwrap().push((to, delivered));
    }

    fn is_removed(&self, id: u64) -> bool {
        self.removed.lock().unwrap().contains(&id)
    }

    fn removed_here(&self) {
        *self.removed_here.lock().unwrap() += 1;
    }
}

/// The chunk with this number.
pub fn chunk(n: usize, size: usize) -> Bytes {
    let mut bytes = vec![n as u8; size];
    bytes[..8].copy_from_slice(&(n as u64).to_be_bytes());
    bytes.into()
}

pub struct Snapshotter(pub Arc<Heard>);

impl Databases for Snapshotter {
    fn open(&self, mut order: Message) -> BoxFuture<'static, std::io::Result<(Message, Chunks)>> {
        let (count, size) = *self.0.to_send.lock().unwrap();
        let heard = self.0.clone();
        Box::pin(async move {
            if count == 0 {
                return Err(std::io::Error::other("no database"));
            }
            let metadata = SnapshotMetadata { index: Some(7), term: Some(1), ..SnapshotMetadata::default() };
            order.snapshot = Some(Snapshot { metadata: Some(metadata), data: None });
            let (sender, chunks) = mpsc::channel(2);
            tokio::spawn(async move {
                for n in 0..count {
                    if sender.send(Ok(chunk(n, size))).await.is_err() {
                        return;
                    }
                    heard.made.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                }
            });
            Ok((order, chunks))
        })
    }

    fn receive(&self, message: Message, mut database: Chunks) -> BoxFuture<'static, Result<(), String>> {
        let heard = self.0.clone();
        Box::pin(async move {
            while heard.holds.load(std::sync::atomic::Ordering::Relaxed) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            let (mut bytes, mut sum) = (0, 0);
            while let Some(chunk) = database.recv().await {
                let chunk = chunk.map_err(|e| e.to_string())?;
                bytes += chunk.len() as u64;
                sum = crc32c::crc32c_append(sum, &chunk);
            }
            heard.databases.lock().unwrap().push((bytes, sum, message));
            Ok(())
        })
    }
}

pub struct Node {
    pub id: u64,
    pub url: String,
    pub heard: Arc<Heard>,
    pub transport: Arc<Transport>,
    pub registry: Registry,
    arbiter: actix_rt::Arbiter,
    listening: Option<Listening>,
}

fn others() -> Handler {
    Arc::new(|request| {
        let text = format!("other: {}\n", request.uri().path());
        Box::pin(async move { Response::new(Full::from(text)) })
    })
}

impl Node {
    pub async fn start(id: u64) -> Self {
        Self::start_at(id, "http://127.0.0.1:0").await
    }

    pub async fn start_at(id: u64, url: &str) -> Self {
        Self::start_in(id, url, CLUSTER).await
    }

    pub async fn start_in(id: u64, url: &str, cluster_id: u64) -> Self {
        let bound = Bound::bind(&[Url::parse(url).unwrap()], false).await.unwrap();
        let url = bound.addresses().first().map_or(url.to_owned(), |address| format!("http://{address}"));
        let heard = Arc::new(Heard::default());
        let arbiter = actix_rt::Arbiter::new();
        let registry = Registry::default();
        let transport = Transport::start(Wiring {
            cluster_id,
            member_id: id,
            own_peer_urls: vec![Url::parse(&url).unwrap()],
            local_address: None,
            election_timeout: Duration::from_secs(1),
            incoming: heard.clone(),
            databases: Arc::new(Snapshotter(heard.clone())),
            arbiter: arbiter.handle(),
            registry: registry.clone(),
        });
        let listening = Some(bound.serve(&arbiter.handle(), &transport, &others(), 64));
        Self { id, url, heard, transport, registry, arbiter, listening }
    }

    pub fn member(&self) -> Member {
        Member { id: self.id, peer_urls: vec![self.url.clone()], ..Member::default() }
    }

    /// Ends the peer port and its connections.
    pub fn stop_listening(&mut self) {
        self.listening = None;
    }

    pub async fn listen_again(&mut self) {
        let url = Url::parse(&self.url).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        let bound = loop {
            match Bound::bind(std::slice::from_ref(&url), false).await {
                Ok(bound) => break bound,
                Err(e) if Instant::now() > deadline => panic!("{e}"),
                Err(_) => tokio::task::yield_now().await,
            }
        };
        self.listening = Some(bound.serve(&self.arbiter.handle(), &self.transport, &others(), 64));
    }

    /// Both streams of the member `from` to this one are there, as the numbers of what was sent tell.
    pub fn stats_of(&self, id: u64) -> crate::actor::stats::Snapshot {
        let name = format!("peer-{id:x}");
        let found = self.registry.actors().into_iter().find(|a| a.name == name).unwrap();
        found.snapshot(Instant::now())
    }

    pub fn metric(&self, sample: &str) -> f64 {
        let mut text = crate::telemetry::Text::default();
        self.transport.render_metrics(&mut text);
        let line =
            text.0.lines().find(|line| line.starts_with(sample)).unwrap_or_else(|| panic!("{sample} in {}", text.0));
        line.rsplit_once(' ').unwrap().1.parse().unwrap()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.transport.stop();
        self.listening = None;
        self.arbiter.stop();
    }
}

/// Two members that know each other and are connected.
pub async fn pair() -> (Node, Node) {
    let (a, b) = (Node::start(1).await, Node::start(2).await);
    introduce(&a, &b).await;
    (a, b)
}

pub async fn introduce(a: &Node, b: &Node) {
    let members = [a.member(), b.member()];
    a.transport.set_members(&members);
    b.transport.set_members(&members);
    connected(a, b).await;
}

/// A probe of each kind goes through in both directions.
pub async fn connected(a: &Node, b: &Node) {
    for (from, to) in [(a, b), (b, a)] {
        for kind in [MessageType::MsgApp, MessageType::MsgTimeoutNow] {
            let mark = Message { commit: Some(u64::MAX), ..message(kind, from.id, to.id) };
            until("a probe arrives", || {
                from.transport.send(vec![mark.clone()]);
                to.heard.messages.lock().unwrap().iter().any(|m| m.commit() == u64::MAX && m.r#type() == kind)
            })
            .await;
        }
    }
    for node in [a, b] {
        // Stragglers of the probing must not be taken for what a test sends.
        let mut before = usize::MAX;
        while before > 0 {
            before = std::mem::take(&mut *node.heard.messages.lock().unwrap()).len();
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
        node.heard.unreachable.lock().unwrap().clear();
    }
}

pub fn message(kind: MessageType, from: u64, to: u64) -> Message {
    Message { r#type: Some(kind as i32), from: Some(from), to: Some(to), term: Some(1), ..Message::default() }
}

pub fn append(from: u64, to: u64, index: u64, data: Bytes) -> Message {
    let entry = Entry { term: Some(1), index: Some(index + 1), data: Some(data), ..Entry::default() };
    Message {
        log_term: Some(1),
        index: Some(index),
        commit: Some(index),
        entries: vec![entry],
        ..message(MessageType::MsgApp, from, to)
    }
}

/// Waits for a condition, 20 s at most.
pub async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !is_so() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A request as written, and everything answered until the other side closes or nothing comes for `quiet`.
pub async fn raw(url: &str, request: &str, body: &[u8], quiet: Duration) -> String {
    let mut socket = TcpStream::connect(url.trim_start_matches("http://")).await.unwrap();
    socket.write_all(request.as_bytes()).await.unwrap();
    socket.write_all(body).await.unwrap();
    let mut answer = Vec::new();
    loop {
        match tokio::time::timeout(quiet, socket.read_buf(&mut answer)).await {
            Ok(Ok(n)) if n > 0 => {}
            _ => return String::from_utf8_lossy(&answer).into_owned(),
        }
    }
}
