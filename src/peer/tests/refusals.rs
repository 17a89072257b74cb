//! What the peer port refuses, and with which words.

use std::time::Duration;

use prost::Message as _;

use super::support::*;
use crate::{
    config::Url,
    pb::raftpb::MessageType,
    peer::{Bound, Links, codec},
};

const VERSIONS: &str = "X-Server-Version: 3.7.1\r\nX-Min-Cluster-Version: 3.0.0\r\n";
const TOO_LONG: &str = "failed to decode raft message (rafthttp: error limit exceeded)\n";
const CLUSTER_HEADER: &str = "X-Etcd-Cluster-ID: c1\r\n";

async fn ask(url: &str, method_and_path: &str, headers: &str, body: &[u8]) -> String {
    let length = if body.is_empty() { String::new() } else { format!("Content-Length: {}\r\n", body.len()) };
    let request = format!("{method_and_path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{length}{headers}\r\n");
    raw(url, &request, body, Duration::from_secs(3)).await
}

#[test]
fn refusals_have_their_status_and_text() {
    run(async {
        let a = Node::start(1).await;
        let silent =
            crate::cluster::Member { id: 2, peer_urls: vec!["http://127.0.0.1:1".to_owned()], ..Default::default() };
        a.transport.set_members(&[a.member(), silent]);
        a.heard.removed.lock().unwrap().push(3);
        let good = format!("{VERSIONS}{CLUSTER_HEADER}X-Raft-To: 1\r\n");
        let version =
            |v: &str, min: &str| format!("X-Server-Version: {v}\r\nX-Min-Cluster-Version: {min}\r\n{CLUSTER_HEADER}");
        let vote = message(MessageType::MsgVote, 2, 1).encode_to_vec();
        let astray = message(MessageType::MsgVote, 2, 8).encode_to_vec();
        let of_removed = message(MessageType::MsgVote, 3, 1).encode_to_vec();
        let head = |m: &crate::pb::raftpb::Message| {
            let mut out = bytes::BytesMut::new();
            codec::put_with_length(m, &mut out);
            out.to_vec()
        };
        let not_snap = head(&message(MessageType::MsgVote, 2, 1));
        let table: &[(&str, &str, &[u8], u16, &str)] = &[
            ("GET /raft", &good, b"", 405, "Method Not Allowed\n"),
            ("GET /raft/snapshot", &good, b"", 405, "Method Not Allowed\n"),
            ("POST /raft/stream/message/2", &good, b"", 405, "Method Not Allowed\n"),
            ("GET /raft/stream/message/2", CLUSTER_HEADER, b"", 412, "incompatible version\n"),
            ("GET /raft/stream/message/2", &version("2.9.9", "2.0.0"), b"", 412, "incompatible version\n"),
            ("GET /raft/stream/message/2", &version("9.0.0", "3.8.0"), b"", 412, "incompatible version\n"),
            ("POST /raft", &version("2.9.9", "2.0.0"), &vote, 412, "incompatible version\n"),
            ("GET /raft/stream/message/2", VERSIONS, b"", 412, "cluster ID mismatch\n"),
            ("POST /raft", VERSIONS, &vote, 412, "cluster ID mismatch\n"),
            ("POST /raft/snapshot", VERSIONS, b"x", 412, "cluster ID mismatch\n"),
            ("GET /raft/stream/other/2", &good, b"", 404, "invalid path\n"),
            ("GET /raft/stream/message", &good, b"", 404, "invalid path\n"),
            ("GET /raft/stream/message/xyz", &good, b"", 404, "invalid from\n"),
            ("GET /raft/stream/message/", &good, b"", 404, "invalid from\n"),
            ("GET /raft/stream/message/3", &good, b"", 410, "removed member\n"),
            ("GET /raft/stream/msgapp/3", &good, b"", 410, "removed member\n"),
            ("GET /raft/stream/msgapp/4", &good, b"", 404, "error sender not found\n"),
            ("GET /raft/stream/msgapp/2", &version("3.7.1", "3.0.0"), b"", 412, "to field mismatch\n"),
            ("POST /raft", &good, b"\xff", 400, "error unmarshalling raft message\n"),
            ("POST /raft", &good, &astray, 500, "error processing raft message\n"),
            ("POST /raft", &good, &of_removed, 500, "error processing raft message\n"),
            ("POST /raft", &good, &vote, 204, ""),
            ("POST /raft", &version("9.0.0", "3.0.0"), &vote, 204, ""),
            ("POST /raft/snapshot", &good, b"\0\0\0", 400, "failed to decode raft message (unexpected EOF)\n"),
            ("POST /raft/snapshot", &good, b"", 400, "failed to decode raft message (EOF)\n"),
            ("POST /raft/snapshot", &good, b"\x7f\0\0\0\0\0\0\0x", 400, TOO_LONG),
            ("POST /raft/snapshot", &good, &not_snap, 400, "wrong raft message type\n"),
            ("GET /version", "", b"", 200, "other: /version\n"),
            ("GET /raft/", "", b"", 200, "other: /raft/\n"),
        ];
        for (request, headers, body, status, text) in table {
            let answer = ask(&a.url, request, headers, body).await;
            let (head, content) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{request}: {answer:?}"));
            assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{request} {headers}: {answer}");
            assert_eq!(content, *text, "{request} {headers}");
            let head = head.to_lowercase();
            if *status == 405 {
                assert!(head.contains("allow: "), "{head}");
            } else if request.contains("/raft") && *status != 200 {
                assert!(head.contains("x-etcd-cluster-id: c1"), "{request}: {head}");
            }
            if *status >= 400 {
                assert!(head.contains("content-type: text/plain; charset=utf-8"), "{request}: {head}");
            }
        }
        assert_eq!(a.heard.messages.lock().unwrap().len(), 2);
    });
}

#[test]
fn versions_that_cannot_be_read_cut_the_connection() {
    run(async {
        let a = Node::start(1).await;
        for headers in ["X-Server-Version: new\r\n", "X-Server-Version: 3.7.1\r\nX-Min-Cluster-Version: 3\r\n"] {
            let answer = ask(&a.url, "POST /raft", &format!("{headers}{CLUSTER_HEADER}"), b"").await;
            assert_eq!(answer, "", "{headers}");
        }
    });
}

#[test]
fn probes_are_answered_with_the_time() {
    run(async {
        let a = Node::start(1).await;
        let answer = ask(&a.url, "GET /raft/probing", "", b"").await;
        let body = answer.split_once("\r\n\r\n").unwrap().1;
        assert!(body.starts_with("{\"OK\":true,\"Now\":\"20") && body.ends_with("Z\"}\n"), "{answer}");
    });
}

#[test]
fn round_trips_are_measured() {
    run(async {
        let (a, _b) = pair().await;
        until("one is measured", || a.metric("etcd_network_peer_round_trip_time_seconds_count{To=\"2\"}") >= 1.0).await;
    });
}

#[test]
fn a_peer_of_another_cluster_gets_nothing() {
    run(async {
        let a = Node::start(1).await;
        let b = Node::start_in(2, "http://127.0.0.1:0", 0xbad).await;
        for node in [&a, &b] {
            node.transport.set_members(&[a.member(), b.member()]);
        }
        b.transport.send(vec![message(MessageType::MsgVote, 2, 1)]);
        until("it is refused", || b.metric("etcd_network_peer_sent_failures_total{To=\"1\"}") >= 1.0).await;
        assert!(a.heard.messages.lock().unwrap().is_empty());
        assert!(b.transport.connected_since(1).is_none());
    });
}

#[test]
fn secure_peer_urls_are_refused_by_name() {
    run(async {
        let bound = Bound::bind(&[Url::parse("https://127.0.0.1:0").unwrap()], false).await;
        let text = bound.err().unwrap().to_string();
        assert_eq!(text, "cannot listen for peers on https://127.0.0.1:0: TLS is not implemented");
    });
}
