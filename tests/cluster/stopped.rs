//! What waits for a stopped leader is the first thing it handles when it goes on: long after it was deposed, and before it
//! knows of that.

use std::{
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use actd::{
    mvcc::record::KeyValue,
    pb::etcdserverpb::{LeaseGrantRequest, LeaseKeepAliveRequest, LeaseRevokeRequest, PutRequest, RangeRequest},
};
use tokio::task::JoinSet;
use tonic::{Code, transport::Endpoint};

use crate::{
    WRITERS, calm,
    common::Client,
    load::Load,
    members::{Cluster, Member, PATIENCE},
    rounds, run, sockets,
};

/// Whence the questions come, so that their connections can be told from those of the load.
const APART: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 9);
const READERS: usize = 8;
const KEY: &str = "stopped";
const STEP: usize = 60;

async fn apart(member: &Member) -> Client {
    let endpoint = Endpoint::from_shared(member.endpoint()).expect("an address").local_address(Some(APART.into()));
    Client::over(endpoint.connect().await.expect("a connection"))
}

async fn until_unread(member: &Member, connections: usize, what: &str, wanted: impl Fn(u64) -> bool) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let unread = sockets::unread(member.client_port, APART);
        if unread.len() == connections && unread.iter().all(|bytes| wanted(*bytes)) {
            return;
        }
        assert!(Instant::now() < deadline, "{what}: {unread:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Puts through `member`, which may not know its leader yet. Answers the revision.
async fn put(member: &Member, value: String) -> i64 {
    let mut kv = member.client().kv;
    let request = PutRequest { key: KEY.into(), value: value.into(), ..Default::default() };
    let deadline = Instant::now() + PATIENCE;
    loop {
        match kv.put(request.clone()).await {
            Ok(answer) => return answer.into_inner().header.expect("a header").revision,
            Err(e) => assert!(Instant::now() < deadline, "{e}"),
        }
    }
}

async fn revoke(member: &Member, id: i64) {
    let mut lease = member.client().lease;
    let deadline = Instant::now() + PATIENCE;
    loop {
        match lease.lease_revoke(LeaseRevokeRequest { id }).await {
            Ok(_) => return,
            Err(e) if e.code() == Code::NotFound => return,
            Err(e) => assert!(Instant::now() < deadline, "{e}"),
        }
    }
}

/// How one question was answered; a wrong answer ends the test.
enum Answer {
    Right,
    Refused,
}

#[test]
fn questions_that_waited_for_a_stopped_leader_get_no_stale_answer() {
    // D-17, L-11
    run(|| async {
        let cluster = Cluster::start(3, &[]).await;
        let load = Load::start(&cluster, WRITERS, 14);
        let (mut right, mut refused) = (0, 0);
        for round in 0..rounds(2) {
            let leader = calm(&cluster, &load, STEP).await;
            let (stopped, other) = (&cluster.members[leader], &cluster.members[(leader + 1) % 3]);
            put(other, format!("before-{round}")).await;
            let grant = LeaseGrantRequest { ttl: 60, id: 0 };
            let id = other.client().lease.lease_grant(grant).await.expect("a lease").into_inner().id;

            // Each connection is made and used before.
            let range = RangeRequest { key: KEY.into(), ..Default::default() };
            let mut readers = Vec::new();
            for _ in 0..READERS {
                let mut kv = apart(stopped).await.kv;
                kv.range(range.clone()).await.expect("a read");
                readers.push(kv);
            }
            let mut renewer = apart(stopped).await.lease;
            let (sender, requests) = tokio::sync::mpsc::channel(1);
            sender.send(LeaseKeepAliveRequest { id }).await.expect("room");
            let requests = tokio_stream::wrappers::ReceiverStream::new(requests);
            let mut renewals = renewer.lease_keep_alive(requests).await.expect("a stream").into_inner();
            assert_eq!(renewals.message().await.expect("an answer").map(|answer| answer.ttl), Some(60));
            until_unread(stopped, READERS + 1, "it reads what it is sent", |bytes| bytes == 0).await;

            stopped.pause();
            let value = format!("after-{round}");
            let revision = put(other, value.clone()).await;
            revoke(other, id).await;

            let mut asked: JoinSet<Answer> = JoinSet::new();
            for mut kv in readers {
                let (range, value) = (range.clone(), value.clone());
                asked.spawn(async move {
                    let Ok(answer) = kv.range(range).await else { return Answer::Refused };
                    let answer = answer.into_inner();
                    let row: KeyValue = prost::Message::decode(answer.kvs[0].0.clone()).expect("a row");
                    assert_eq!(row.value, value, "a stale read");
                    assert!(answer.header.expect("a header").revision >= revision, "a stale header");
                    Answer::Right
                });
            }
            asked.spawn(async move {
                sender.send(LeaseKeepAliveRequest { id }).await.expect("room");
                let Ok(Some(answer)) = renewals.message().await else { return Answer::Refused };
                assert_eq!(answer.ttl, 0, "the lease was revoked");
                Answer::Right
            });
            until_unread(stopped, READERS + 1, "a question waits in each connection", |bytes| bytes > 0).await;

            stopped.resume();
            let answers = tokio::time::timeout(PATIENCE, asked.join_all()).await.expect("all are answered");
            assert_eq!(answers.len(), READERS + 1);
            for answer in answers {
                match answer {
                    Answer::Right => right += 1,
                    Answer::Refused => refused += 1,
                }
            }
        }
        println!("answers of leaders that had been stopped: {right} right, {refused} refused");
        println!("{:?}", load.finish(&cluster).await);
    });
}
