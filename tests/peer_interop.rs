//! Our transport as a learner of a real etcd: it gets the whole log over etcd's streams.
//!
//! The installed etcd is used, or the one that `ETCD_BIN` names. Raft is played by the test: it takes appends in order and
//! answers heartbeats.

mod common;

use std::{
    sync::{Arc, Mutex, OnceLock},
    time::{Duration, Instant},
};

use actd::{
    actor::Registry,
    cluster::Member,
    config::Url,
    pb::{
        etcdserverpb::{InternalRaftRequest, MemberAddRequest, PutRequest},
        raftpb::{Entry, Message, MessageType},
    },
    peer::{Bound, Chunks, Databases, Handler, Incoming, Links, Transport, Wiring},
};
use futures_util::future::BoxFuture;
use prost::Message as _;

#[derive(Default)]
struct Follower {
    transport: OnceLock<Arc<Transport>>,
    log: Mutex<Vec<Entry>>,
    heartbeats: Mutex<u32>,
}

impl Incoming for Follower {
    fn message(&self, message: Message) {
        let mut answer = Message { to: message.from, from: message.to, term: message.term, ..Message::default() };
        match message.r#type() {
            MessageType::MsgApp => {
                answer.r#type = Some(MessageType::MsgAppResp as i32);
                let mut log = self.log.lock().unwrap();
                let last = log.len() as u64;
                if message.index() > last {
                    answer.index = message.index;
                    answer.reject = Some(true);
                    answer.reject_hint = Some(last);
                } else {
                    log.truncate(message.index() as usize);
                    log.extend(message.entries);
                    answer.index = Some(log.len() as u64);
                }
            }
            MessageType::MsgHeartbeat => {
                *self.heartbeats.lock().unwrap() += 1;
                answer.r#type = Some(MessageType::MsgHeartbeatResp as i32);
                answer.context = message.context;
            }
            _ => return,
        }
        if let Some(transport) = self.transport.get() {
            transport.send(vec![answer]);
        }
    }

    fn unreachable(&self, _: u64) {}

    fn snapshot_sent(&self, _: u64, _: bool) {}

    fn is_removed(&self, _: u64) -> bool {
        false
    }

    fn removed_here(&self) {}
}

struct NoDatabases;

impl Databases for NoDatabases {
    fn open(&self, _: Message) -> BoxFuture<'static, std::io::Result<(Message, Chunks)>> {
        Box::pin(async { Err(std::io::Error::other("none")) })
    }

    fn receive(&self, _: Message, _: Chunks) -> BoxFuture<'static, Result<(), String>> {
        Box::pin(async { Err("none".to_owned()) })
    }
}

async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !is_so() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Keys of the puts in a log.
fn keys(log: &[Entry]) -> Vec<String> {
    log.iter()
        .filter_map(|entry| InternalRaftRequest::decode(entry.data()).ok()?.put)
        .map(|put| String::from_utf8_lossy(&put.key).into_owned())
        .filter(|key| key.starts_with("key"))
        .collect()
}

#[test]
fn a_real_etcd_sends_its_log_to_our_transport() {
    let Some(etcd) = common::require_tool("etcd") else { return };
    let server = common::Server::start(&etcd, &[]);
    println!("etcd {}", server.version());
    actix_rt::System::new().block_on(attach(&server));
}

async fn attach(server: &common::Server) {
    let mut client = common::Client::connect(server).await;
    let mut put = async |n: usize| {
        let request =
            PutRequest { key: format!("key{n}").into(), value: vec![7; 2000].into(), ..PutRequest::default() };
        client.kv.put(request).await.unwrap();
    };
    for n in 0..20 {
        put(n).await;
    }
    let bound = Bound::bind(&[Url::parse("http://127.0.0.1:0").unwrap()], false).await.unwrap();
    let own_url = format!("http://{}", bound.addresses()[0]);
    let request = MemberAddRequest { peer_ur_ls: vec![own_url.clone()], is_learner: true };
    let added = client.cluster.member_add(request).await.unwrap().into_inner();
    let header = added.header.unwrap();
    let member_id = added.member.unwrap().id;

    let follower = Arc::new(Follower::default());
    let arbiter = actix_rt::Arbiter::new();
    let transport = Transport::start(Wiring {
        cluster_id: header.cluster_id,
        member_id,
        own_peer_urls: vec![Url::parse(&own_url).unwrap()],
        local_address: None,
        election_timeout: Duration::from_secs(1),
        incoming: follower.clone(),
        databases: Arc::new(NoDatabases),
        arbiter: arbiter.handle(),
        registry: Registry::default(),
    });
    let _ = follower.transport.set(transport.clone());
    let others: Handler = Arc::new(|_| Box::pin(async { http::Response::default() }));
    let _listening = bound.serve(&arbiter.handle(), &transport, &others, 64);
    let peer_urls = vec![format!("http://127.0.0.1:{}", server.peer_port)];
    transport.set_members(&[Member { id: header.member_id, peer_urls, ..Member::default() }]);

    let expected: Vec<String> = (0..20).map(|n| format!("key{n}")).collect();
    until("the log before it was added is there", || keys(&follower.log.lock().unwrap()) == expected).await;
    for n in 20..120 {
        put(n).await;
    }
    let expected: Vec<String> = (0..120).map(|n| format!("key{n}")).collect();
    until("the log since is there", || keys(&follower.log.lock().unwrap()) == expected).await;
    let log = follower.log.lock().unwrap().clone();
    assert!(log.iter().enumerate().all(|(i, entry)| entry.index() == i as u64 + 1), "no gap, nothing twice");
    let before = *follower.heartbeats.lock().unwrap();
    until("heartbeats go on", || *follower.heartbeats.lock().unwrap() > before + 5).await;
    assert!(transport.connected_since(header.member_id).is_some());
    println!("{} entries, {} heartbeats", log.len(), follower.heartbeats.lock().unwrap());
    transport.stop();
    arbiter.stop();
}
