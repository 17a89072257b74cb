//! Transports that talk to each other.

use std::{
    sync::atomic::Ordering::Relaxed,
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::support::*;
use crate::{
    pb::raftpb::{Entry, Message, MessageType},
    peer::Links,
};

#[test]
fn messages_of_all_kinds_arrive_in_order_and_whole() {
    run(async {
        let (a, b) = pair().await;
        let kinds = [
            MessageType::MsgProp,
            MessageType::MsgVote,
            MessageType::MsgVoteResp,
            MessageType::MsgHeartbeat,
            MessageType::MsgHeartbeatResp,
            MessageType::MsgTransferLeader,
            MessageType::MsgTimeoutNow,
            MessageType::MsgReadIndex,
            MessageType::MsgReadIndexResp,
            MessageType::MsgPreVote,
            MessageType::MsgPreVoteResp,
            MessageType::MsgAppResp,
        ];
        let others: Vec<Message> = (0..300)
            .map(|n| Message {
                index: Some(n),
                context: Some(Bytes::from(vec![n as u8; 20])),
                ..message(kinds[n as usize % 12], 1, 2)
            })
            .collect();
        let appends: Vec<Message> = (1..300).map(|n| append(1, 2, n, Bytes::from(vec![n as u8; 200]))).collect();
        for message in others.iter().chain(&appends) {
            a.transport.send(vec![message.clone()]);
        }
        until("all are there", || b.heard.messages.lock().unwrap().len() >= others.len() + appends.len()).await;
        let heard = b.heard.messages.lock().unwrap().clone();
        let (app, other): (Vec<Message>, Vec<Message>) =
            heard.into_iter().partition(|m| m.r#type() == MessageType::MsgApp);
        assert_eq!(app, appends);
        assert_eq!(other, others);
        assert!(a.transport.connected_since(2).is_some() && b.transport.connected_since(1).is_some());
        assert!(a.transport.connected_since(3).is_none());
    });
}

#[test]
fn entries_of_many_megabytes_arrive_whole() {
    run(async {
        let (a, b) = pair().await;
        let data: Bytes = (0..20usize << 20).map(|n| ((n * 31) >> 3) as u8).collect::<Vec<u8>>().into();
        let big = append(1, 2, 4, data);
        a.transport.send(vec![big.clone(), append(1, 2, 5, Bytes::from_static(b"after"))]);
        until("both are there", || b.heard.messages.lock().unwrap().len() == 2).await;
        assert!(b.heard.messages.lock().unwrap()[0] == big);
    });
}

#[test]
fn only_the_last_append_answer_of_a_batch_is_sent() {
    run(async {
        let (a, b) = pair().await;
        let answer = |index| Message { index: Some(index), ..message(MessageType::MsgAppResp, 1, 2) };
        let beat = message(MessageType::MsgHeartbeatResp, 1, 2);
        a.transport.send(vec![answer(1), beat.clone(), answer(2), answer(3)]);
        a.transport.send(vec![answer(4)]);
        until("the last is there", || b.heard.messages.lock().unwrap().last() == Some(&answer(4))).await;
        assert_eq!(*b.heard.messages.lock().unwrap(), [beat, answer(3), answer(4)]);
    });
}

/// CPU seconds of this process.
fn cpu() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) / 100.0
}

#[test]
fn ten_thousand_appends_arrive_in_order() {
    run(async {
        let (a, b) = pair().await;
        const COUNT: u64 = 10_000;
        let data = Bytes::from(vec![7; 256]);
        let (began, cpu_before) = (Instant::now(), cpu());
        for n in 0..COUNT {
            // Not more than the queues take: nothing may be lost here.
            while n - b.heard.messages.lock().unwrap().len() as u64 > 2_000 {
                tokio::task::yield_now().await;
            }
            a.transport.send(vec![append(1, 2, n, data.clone())]);
        }
        until("all are there", || b.heard.messages.lock().unwrap().len() as u64 == COUNT).await;
        let (took, used) = (began.elapsed().as_secs_f64(), cpu() - cpu_before);
        println!(
            "{:.0} messages/s, {:.1} µs CPU per message, both sides",
            COUNT as f64 / took,
            used * 1e6 / COUNT as f64
        );
        let heard = b.heard.messages.lock().unwrap();
        assert!(heard.iter().enumerate().all(|(n, m)| m.index() == n as u64 && m.entries.len() == 1));
        assert!(a.metric("etcd_network_peer_sent_bytes_total{To=\"2\"}") > 2_560_000.0);
        assert!(b.metric("etcd_network_peer_received_bytes_total{From=\"1\"}") > 2_560_000.0);
    });
}

#[test]
fn broken_streams_are_dialled_again() {
    run(async {
        let (a, mut b) = pair().await;
        b.stop_listening();
        until("a sees the break", || a.transport.connected_since(2).is_none()).await;
        assert!(a.metric("etcd_network_disconnected_peers_total{Local=\"1\",Remote=\"2\"}") >= 1.0);
        assert_eq!(a.metric("etcd_network_active_peers{Local=\"1\",Remote=\"2\"}"), 0.0);
        b.listen_again().await;
        until("a is connected again", || a.transport.connected_since(2).is_some()).await;
        connected(&a, &b).await;
        assert_eq!(a.metric("etcd_network_active_peers{Local=\"1\",Remote=\"2\"}"), 1.0);
    });
}

#[test]
fn the_next_url_is_tried_when_one_fails() {
    run(async {
        let (a, b) = (Node::start(1).await, Node::start(2).await);
        let mut member = b.member();
        // A port that nobody listens on comes first.
        let unused = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        member.peer_urls.insert(0, format!("http://{}", unused.local_addr().unwrap()));
        drop(unused);
        a.transport.set_members(&[a.member(), member]);
        b.transport.set_members(&[a.member(), b.member()]);
        connected(&a, &b).await;
    });
}

#[test]
fn unix_sockets_carry_streams_too() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let url = |name: &str| format!("unix://{}/{name}", dir.path().display());
        let (a, b) = (Node::start_at(1, &url("a")).await, Node::start_at(2, &url("b")).await);
        introduce(&a, &b).await;
    });
}

#[test]
fn urls_that_change_are_used() {
    run(async {
        let (a, b) = pair().await;
        let c = Node::start(2).await;
        c.transport.set_members(&[a.member(), c.member()]);
        let mut b = b;
        b.stop_listening();
        a.transport.set_members(&[a.member(), c.member()]);
        connected(&a, &c).await;
    });
}

#[test]
fn requests_carry_the_member_s_present_urls() {
    // C-18, C-19
    run(async {
        let a = Node::start(1).await;
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let b = crate::cluster::Member { id: 2, peer_urls: vec![url], ..Default::default() };
        let mut told = a.member();
        for urls in [vec![a.url.clone()], vec!["http://127.0.0.1:7".to_owned(), "http://127.0.0.1:8".to_owned()]] {
            told.peer_urls = urls.clone();
            a.transport.set_members(&[told.clone(), b.clone()]);
            let expected = format!("x-peerurls: {}\r\n", urls.join(","));
            let deadline = Instant::now() + Duration::from_secs(10);
            loop {
                // It dials again when this one ends.
                let (mut socket, _) = listener.accept().await.unwrap();
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(socket.read_u8().await.unwrap());
                }
                let head = String::from_utf8(head).unwrap().to_lowercase();
                if head.contains(&expected) {
                    break;
                }
                assert!(Instant::now() < deadline, "{expected} is not in {head}");
            }
        }
    });
}

/// Dials a stream as member 2 and reads nothing.
async fn dial_only(a: &Node, kind: &str) -> TcpStream {
    let mut socket = TcpStream::connect(a.url.trim_start_matches("http://")).await.unwrap();
    let request = format!(
        "GET /raft/stream/{kind}/2 HTTP/1.1\r\nHost: x\r\nX-Server-From: 2\r\nX-Server-Version: 3.7.1\r\n\
         X-Min-Cluster-Version: 3.0.0\r\nX-Etcd-Cluster-ID: c1\r\nX-Raft-To: 1\r\n\r\n"
    );
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        answer.push(socket.read_u8().await.unwrap());
    }
    let answer = String::from_utf8(answer).unwrap().to_lowercase();
    assert!(answer.starts_with("http/1.1 200 ok\r\n"), "{answer}");
    assert!(answer.contains("x-server-version: 3.7.1\r\n") && answer.contains("x-etcd-cluster-id: c1\r\n"), "{answer}");
    socket
}

/// Member 2 as one that never listens.
fn silent() -> crate::cluster::Member {
    crate::cluster::Member { id: 2, peer_urls: vec!["http://127.0.0.1:1".to_owned()], ..Default::default() }
}

#[test]
fn a_new_stream_of_the_same_kind_replaces_the_old() {
    run(async {
        let a = Node::start(1).await;
        a.transport.set_members(&[a.member(), silent()]);
        let mut old = dial_only(&a, "message").await;
        let mut new = dial_only(&a, "message").await;
        let mut rest = Vec::new();
        let ended = tokio::time::timeout(Duration::from_secs(3), old.read_to_end(&mut rest)).await;
        assert!(ended.is_ok(), "the old one is closed");
        // A chunk, and in it a message behind its length.
        a.transport.send(vec![message(MessageType::MsgVote, 1, 2)]);
        let mut bytes = vec![0; 21];
        tokio::time::timeout(Duration::from_secs(3), new.read_exact(&mut bytes)).await.unwrap().unwrap();
        assert_eq!(bytes, b"10\r\n\x00\x00\x00\x00\x00\x00\x00\x08\x08\x05\x10\x02\x18\x01\x20\x01\r"[..]);
    });
}

#[test]
fn link_heartbeats_come_often_enough() {
    run(async {
        let a = Node::start(1).await;
        a.transport.set_members(&[a.member(), silent()]);
        let mut append = dial_only(&a, "msgapp").await;
        let began = Instant::now();
        for _ in 0..2 {
            let mut bytes = [0; 6];
            append.read_exact(&mut bytes).await.unwrap();
            assert_eq!(&bytes, b"1\r\n\x00\r\n");
        }
        assert!((2_800..4_500).contains(&began.elapsed().as_millis()), "{:?}", began.elapsed());
    });
}

#[test]
fn a_slow_reader_loses_messages_and_send_does_not_wait() {
    run(async {
        let a = Node::start(1).await;
        a.transport.set_members(&[a.member(), silent()]);
        let _append = dial_only(&a, "msgapp").await;
        let mut messages = dial_only(&a, "message").await;
        let data = Bytes::from(vec![1; 64 << 10]);
        let mut longest = Duration::ZERO;
        // Far more than sockets and queues hold: 64 MiB queued, 400 MiB sent.
        for n in 0..6_400 {
            let began = Instant::now();
            a.transport.send(vec![append(1, 2, n, data.clone())]);
            longest = longest.max(began.elapsed());
            if n % 64 == 0 {
                tokio::task::yield_now().await;
            }
        }
        until("it is reported", || a.heard.unreachable.lock().unwrap().contains(&2)).await;
        assert!(longest < Duration::from_millis(500), "{longest:?}");
        assert!(a.metric("etcd_network_peer_sent_failures_total{To=\"2\"}") > 1_000.0);
        // The other stream is not held up.
        a.transport.send(vec![message(MessageType::MsgHeartbeat, 1, 2)]);
        let mut bytes = vec![0; 12];
        tokio::time::timeout(Duration::from_secs(3), messages.read_exact(&mut bytes)).await.unwrap().unwrap();
        // Nobody reads for longer than a write may take: the stream is given up, and appends take the other one.
        let mut read = Vec::new();
        let deadline = Instant::now() + Duration::from_secs(15);
        while !read.windows(6).any(|bytes| bytes == b"\x08\x03\x10\x02\x18\x01") {
            assert!(Instant::now() < deadline, "the stream is not given up");
            a.transport.send(vec![append(1, 2, 1, Bytes::from_static(b"x"))]);
            let _ = tokio::time::timeout(Duration::from_millis(50), messages.read_buf(&mut read)).await;
        }
    });
}

#[test]
fn messages_for_a_member_that_is_down_are_lost_within_bounds() {
    run(async {
        let a = Node::start(1).await;
        a.transport.set_members(&[a.member(), silent()]);
        for n in 0..20_000 {
            a.transport.send(vec![append(1, 2, n, Bytes::from_static(b"x"))]);
        }
        until("it is reported", || a.heard.unreachable.lock().unwrap().contains(&2)).await;
        until("none is kept", || a.stats_of(2).depth == 0).await;
        let mut order = message(MessageType::MsgSnap, 1, 2);
        order.snapshot = Some(Default::default());
        *a.heard.to_send.lock().unwrap() = (3, 100);
        a.transport.send(vec![order]);
        until("the snapshot is lost", || *a.heard.snapshots_sent.lock().unwrap() == [(2, false)]).await;
    });
}

#[test]
fn a_database_of_a_hundred_megabytes_passes_in_pieces() {
    run(async {
        let (a, b) = pair().await;
        const CHUNK: usize = 64 << 10;
        const COUNT: usize = 1_600;
        *a.heard.to_send.lock().unwrap() = (COUNT, CHUNK);
        let sum = (0..COUNT).fold(0, |sum, n| crc32c::crc32c_append(sum, &chunk(n, CHUNK)));
        b.heard.holds.store(true, Relaxed);
        a.transport.send(vec![message(MessageType::MsgSnap, 1, 2)]);
        // Nobody takes it in: the maker soon waits, with no more made than sockets and a few chunks hold.
        let mut made = 0;
        while made == 0 || made < a.heard.made.load(Relaxed) {
            made = a.heard.made.load(Relaxed);
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        assert!(made < COUNT as u64 / 4, "{made} chunks of {COUNT}");
        b.heard.holds.store(false, Relaxed);
        until("it is delivered", || *a.heard.snapshots_sent.lock().unwrap() == [(2, true)]).await;
        let databases = b.heard.databases.lock().unwrap();
        let (bytes, found, head) = &databases[0];
        assert_eq!((*bytes, *found), ((COUNT * CHUNK) as u64, sum));
        assert_eq!(head.snapshot.as_ref().unwrap().metadata.as_ref().unwrap().index(), 7);
        assert_eq!(a.heard.made.load(Relaxed), COUNT as u64);
        assert_eq!(a.metric("etcd_network_snapshot_send_success{To=\"2\"}"), 1.0);
        assert_eq!(b.metric("etcd_network_snapshot_receive_success{From=\"1\"}"), 1.0);
        assert_eq!(b.metric("etcd_network_snapshot_receive_inflights_total{From=\"1\"}"), 0.0);
        assert!(a.heard.unreachable.lock().unwrap().is_empty());
    });
}

#[test]
fn a_database_that_cannot_be_opened_is_reported() {
    run(async {
        let (a, _b) = pair().await;
        a.transport.send(vec![message(MessageType::MsgSnap, 1, 2)]);
        until("it is reported", || *a.heard.snapshots_sent.lock().unwrap() == [(2, false)]).await;
        assert_eq!(a.metric("etcd_network_snapshot_send_failures{To=\"2\"}"), 1.0);
    });
}

#[test]
fn a_removed_member_is_told_so_and_gets_nothing_more() {
    run(async {
        let (a, b) = pair().await;
        a.heard.removed.lock().unwrap().push(2);
        a.transport.set_members(&[a.member()]);
        until("it knows", || *b.heard.removed_here.lock().unwrap() > 0).await;
        a.transport.send(vec![message(MessageType::MsgHeartbeat, 1, 2)]);
        b.transport.send(vec![message(MessageType::MsgHeartbeat, 2, 1)]);
        // What b posts is refused; the actor for it is gone.
        until("its posts fail", || b.metric("etcd_network_peer_sent_failures_total{To=\"1\"}") >= 1.0).await;
        assert!(a.heard.messages.lock().unwrap().is_empty() && b.heard.messages.lock().unwrap().is_empty());
        assert!(a.registry.actors().is_empty());
        assert!(a.transport.connected_since(2).is_none());
    });
}

#[test]
fn an_unknown_sender_is_answered_by_posts_until_it_is_a_member() {
    run(async {
        let (a, b) = (Node::start(1).await, Node::start(2).await);
        // b knows a; a has not heard of b.
        b.transport.set_members(&[a.member(), b.member()]);
        let vote = message(MessageType::MsgVote, 2, 1);
        until("b's post is there", || {
            b.transport.send(vec![vote.clone()]);
            a.heard.messages.lock().unwrap().contains(&vote)
        })
        .await;
        let answer = message(MessageType::MsgVoteResp, 1, 2);
        until("the answer is there", || {
            a.transport.send(vec![answer.clone()]);
            b.heard.messages.lock().unwrap().contains(&answer)
        })
        .await;
        a.transport.set_members(&[a.member(), b.member()]);
        connected(&a, &b).await;
    });
}

#[test]
fn misdirected_messages_are_dropped() {
    run(async {
        let (a, b) = pair().await;
        // A member list that names b under another id.
        let mut wrong = b.member();
        wrong.id = 9;
        a.transport.set_members(&[a.member(), wrong]);
        a.transport.send(vec![message(MessageType::MsgVote, 1, 9)]);
        until("the post is refused", || a.metric("etcd_network_peer_sent_failures_total{To=\"9\"}") >= 1.0).await;
        assert!(b.heard.messages.lock().unwrap().is_empty());
    });
}

#[test]
fn after_the_stop_nothing_is_sent_or_dialled() {
    run(async {
        let (a, b) = pair().await;
        a.transport.stop();
        a.transport.set_members(&[a.member(), b.member()]);
        until("b sees it", || b.transport.connected_since(1).is_none() || a.registry.actors().is_empty()).await;
        a.transport.send(vec![Message { entries: vec![Entry::default()], ..message(MessageType::MsgProp, 1, 2) }]);
        assert!(a.transport.connected_since(2).is_none());
    });
}

#[test]
fn a_post_that_may_have_arrived_is_not_made_again() {
    // D-21: a forwarded proposal that arrives twice takes effect twice.
    run(async {
        let a = Node::start(1).await;
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        a.transport.set_members([&crate::cluster::Member { id: 2, peer_urls: vec![url], ..Default::default() }]);
        let (told, mut posts) = tokio::sync::mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Ok((mut socket, _)) = listener.accept().await {
                let told = told.clone();
                tokio::spawn(async move {
                    let mut first = true;
                    let mut read = BytesMut::new();
                    while socket.read_buf(&mut read).await.is_ok_and(|n| n > 0) {
                        // Streams and probes get no answer at all.
                        if !read.starts_with(b"POST /raft ") {
                            return;
                        }
                        // The entry's data are the last bytes of a post.
                        let has_head = read.windows(4).any(|end| end == b"\r\n\r\n");
                        if !has_head || !read.ends_with(b"-") {
                            continue;
                        }
                        let _ = told.send(read.split());
                        if !std::mem::take(&mut first) {
                            return; // taken, and never answered
                        }
                        socket.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.unwrap();
                    }
                });
            }
        });
        let proposal = |key: &'static [u8]| Message {
            entries: vec![crate::pb::raftpb::Entry { data: Some(key.into()), ..Default::default() }],
            ..message(MessageType::MsgProp, 1, 2)
        };
        let keys = [b"one-", b"two-", b"tri-", b"for-", b"fiv-", b"six-", b"sev-", b"ate-", b"nin-"];
        let quiet = Duration::from_millis(500);
        let mut arrived = Vec::new();
        for key in keys {
            a.transport.send(vec![proposal(key)]);
            // One may be lost on a connection that is closed just then; that is allowed.
            arrived.extend(tokio::time::timeout(quiet, posts.recv()).await.ok().flatten());
        }
        // Whatever is made again comes at once.
        while let Ok(Some(post)) = tokio::time::timeout(quiet, posts.recv()).await {
            arrived.push(post);
        }
        let times = keys.map(|key| arrived.iter().filter(|post| post.windows(4).any(|w| w == key)).count());
        assert!(times.iter().all(|n| *n <= 1), "{times:?}");
        assert!(times.iter().sum::<usize>() > 4, "{times:?}");
    });
}
