//! Answers longer than memory should hold at once: read piece by piece as their clients take them, inside a budget
//! that all of them share, and still the messages etcd sends.

mod common;

use std::{
    path::Path,
    time::{Duration, Instant},
};

use actd::pb::etcdserverpb::{
    CompactionRequest, PutRequest, RangeRequest, RangeResponse, RequestOp, TxnRequest, request_op::Request,
    response_op::Response,
};
use bytes::Bytes;
use common::{
    Client, Server,
    raw::{RawCodec, channel},
};
use http::uri::PathAndQuery;
use prost::Message;
use tonic::{Code, Status, Streaming, transport::Channel};

fn start() -> Server {
    Server::start(Path::new(&common::server_under_test(env!("CARGO_BIN_EXE_actd"))), &["--quota-backend-bytes=0"])
}

/// Begins a range whose answer is taken only as the test asks for it: up to a flow-control window is on its way.
async fn begin(channel: Channel, req: &RangeRequest) -> Result<Streaming<Bytes>, Status> {
    let mut grpc = tonic::client::Grpc::new(channel).max_decoding_message_size(usize::MAX);
    grpc.ready().await.expect("ready");
    let path = PathAndQuery::from_static("/etcdserverpb.KV/Range");
    let request = tonic::Request::new(Bytes::from(req.encode_to_vec()));
    grpc.server_streaming(request, path, RawCodec).await.map(tonic::Response::into_inner)
}

async fn whole(channel: Channel, req: &RangeRequest) -> Result<RangeResponse, Status> {
    let mut stream = begin(channel, req).await?;
    let message = stream.message().await?.expect("one message");
    assert!(stream.message().await?.is_none(), "a second message");
    Ok(RangeResponse::decode(message).expect("a range response"))
}

fn everything() -> RangeRequest {
    RangeRequest { key: b"\0".as_slice().into(), range_end: b"\0".as_slice().into(), ..Default::default() }
}

fn key(n: usize) -> String {
    format!("key-{n:08}")
}

fn value(n: usize, bytes: usize) -> Bytes {
    let mut value = format!("{n}:").into_bytes();
    value.resize(bytes, b'a' + (n % 26) as u8);
    value.into()
}

async fn fill(client: &mut Client, keys: usize, bytes: usize) {
    for n in 0..keys {
        let put = PutRequest { key: key(n).into(), value: value(n, bytes), ..Default::default() };
        client.kv.put(put).await.expect("a put");
    }
}

/// A number of the server's `/proc` status, in KiB.
fn memory(server: &Server, name: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).expect("the server's status");
    let line = status.lines().find(|line| line.starts_with(name)).expect("the number");
    line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("a number")
}

#[tokio::test]
async fn long_answers_are_those_of_short_pages() {
    let server = start();
    let mut client = Client::connect(&server).await;
    const KEYS: usize = 2_500;
    fill(&mut client, KEYS, 2_000).await;
    for n in [3, 1_700, 2_499] {
        let put = PutRequest { key: key(n).into(), value: value(n, 30_000), ..Default::default() };
        client.kv.put(put).await.expect("a put");
    }
    let channel = channel(&server).await;

    // What pages of 100 keys say, which are short.
    let pages = async |revision: i64, keys_only: bool| {
        let (mut kvs, mut from) = (Vec::new(), Bytes::from_static(b"\0"));
        loop {
            let req = RangeRequest { key: from, limit: 100, revision, keys_only, ..everything() };
            let page = whole(channel.clone(), &req).await.expect("a page");
            kvs.extend(page.kvs);
            if !page.more {
                return kvs;
            }
            from = [key(kvs.len() - 1).as_bytes(), b"\0"].concat().into();
        }
    };
    let newest = 1 + KEYS as i64 + 3;
    let (now, before, keys) = (pages(0, false).await, pages(newest - 3, false).await, pages(0, true).await);
    assert_eq!((now.len(), before.len(), keys.len()), (KEYS, KEYS, KEYS));
    assert!(now != before && now != keys);

    let head = |answer: &RangeResponse| {
        let header = answer.header.as_ref().expect("a header");
        assert!(header.cluster_id != 0 && header.member_id != 0 && header.raft_term != 0);
        (header.revision, answer.count, answer.more)
    };
    let all = whole(channel.clone(), &everything()).await.expect("an answer");
    assert_eq!(head(&all), (newest, KEYS as i64, false));
    assert!(all.kvs == now);
    let serializable = RangeRequest { serializable: true, ..everything() };
    assert!(whole(channel.clone(), &serializable).await.expect("an answer") == all);
    let pinned = RangeRequest { revision: newest - 3, ..everything() };
    let pinned = whole(channel.clone(), &pinned).await.expect("an answer");
    assert_eq!(head(&pinned), (newest, KEYS as i64, false));
    assert!(pinned.kvs == before);
    let limited = RangeRequest { limit: 1_800, ..everything() };
    let limited = whole(channel.clone(), &limited).await.expect("an answer");
    assert_eq!(head(&limited), (newest, KEYS as i64, true));
    assert!(limited.kvs == now[..1_800]);
    let keys_only = RangeRequest { keys_only: true, ..everything() };
    let keys_only = whole(channel.clone(), &keys_only).await.expect("an answer");
    assert_eq!(head(&keys_only), (newest, KEYS as i64, false));
    assert!(keys_only.kvs == keys);
    let one = RangeRequest { key: key(3).into(), ..Default::default() };
    assert!(whole(channel.clone(), &one).await.expect("an answer").kvs == now[3..4]);

    // In an order of its own, and in a transaction.
    let sorted = RangeRequest { sort_order: 2, ..everything() };
    let sorted = whole(channel.clone(), &sorted).await.expect("an answer");
    assert_eq!(head(&sorted), (newest, KEYS as i64, false));
    assert!(sorted.kvs.iter().eq(now.iter().rev()));
    let op = |range| RequestOp { request: Some(Request::RequestRange(range)) };
    let txn = TxnRequest { success: vec![op(everything()), op(everything())], ..Default::default() };
    let mut kv = client.kv.clone().max_decoding_message_size(usize::MAX);
    let answer = kv.txn(txn).await.expect("an answer").into_inner();
    assert_eq!(answer.responses.len(), 2);
    for op in answer.responses {
        let Some(Response::ResponseRange(range)) = op.response else { panic!("not a range") };
        assert!(range.kvs == now);
    }

    // And as a stream of parts.
    let mut parts = kv.range_stream(everything()).await.expect("a stream").into_inner();
    let mut kvs = Vec::new();
    while let Some(part) = parts.message().await.expect("a part") {
        kvs.extend(part.range_response.expect("a part has an answer").kvs);
    }
    assert!(kvs == now);

    let future = RangeRequest { revision: newest + 1, ..everything() };
    let refused = whole(channel, &future).await.expect_err("of the future");
    assert_eq!(refused.message(), "etcdserver: mvcc: required revision is a future revision");
}

#[tokio::test]
async fn answer_that_compaction_overtakes_ends_with_an_error() {
    let server = start();
    let mut client = Client::connect(&server).await;
    fill(&mut client, 300, 64 << 10).await;
    let mut taken_too_late = begin(channel(&server).await, &everything()).await.expect("the answer begins");
    let put = PutRequest { key: key(299).into(), value: "new".into(), ..Default::default() };
    client.kv.put(put).await.expect("a put");
    client.kv.compact(CompactionRequest { revision: 302, physical: true }).await.expect("a compaction");
    let error = taken_too_late.message().await.expect_err("an answer that is not whole");
    // Clients find the end of the stream in the middle of a message.
    assert!(matches!(error.code(), Code::OutOfRange | Code::Internal), "{error}");
    // Who asks again is answered.
    let all = whole(channel(&server).await, &everything()).await.expect("an answer");
    assert_eq!((all.kvs.len(), all.count, all.more), (300, 300, false));

    // An answer of one piece is read at once and hears nothing of compactions.
    let few = RangeRequest { limit: 10, ..everything() };
    let mut taken_late = begin(channel(&server).await, &few).await.expect("the answer begins");
    let put = PutRequest { key: key(3).into(), value: "new".into(), ..Default::default() };
    client.kv.put(put).await.expect("a put");
    client.kv.compact(CompactionRequest { revision: 303, physical: true }).await.expect("a compaction");
    let message = taken_late.message().await.expect("a whole answer").expect("one message");
    let answer = RangeResponse::decode(message).expect("a range response");
    assert_eq!((answer.kvs.len(), answer.count, answer.more), (10, 300, true));
}

/// How much is listed, by how many at once, and how much more memory that may take: a fraction of what is asked for.
const LISTERS: u64 = 20;
const MAY_GROW_MIB: u64 = 160;

#[tokio::test]
async fn many_lists_at_once_share_a_bounded_memory() {
    let list_mib = std::env::var("LONG_LISTS_MIB").ok().and_then(|n| n.parse().ok()).unwrap_or(48);
    const VALUE: usize = 32 << 10;
    let server = start();
    let mut client = Client::connect(&server).await;
    fill(&mut client, (list_mib << 20) / VALUE, VALUE).await;
    // Once alone: what a cache takes stays.
    let alone = whole(channel(&server).await, &everything()).await.expect("an answer");
    let (bytes, count) = (alone.encoded_len(), alone.count);
    drop(alone);
    let before = memory(&server, "VmRSS");
    let cpu = || server.metric("process_cpu_seconds_total").expect("CPU time");
    let cpu_before = cpu();

    let began = Instant::now();
    let mut lists = Vec::new();
    for _ in 0..LISTERS {
        let channel = channel(&server).await;
        lists.push(tokio::spawn(async move {
            let mut stream = begin(channel, &everything()).await?;
            // Slow clients: all have begun before the first goes on.
            tokio::time::sleep(Duration::from_secs(3)).await;
            let message = stream.message().await?.expect("one message");
            Ok::<_, Status>(message.len())
        }));
    }
    for list in lists {
        assert_eq!(list.await.expect("no panic").expect("an answer"), bytes);
    }
    let most = memory(&server, "VmHWM");
    println!(
        "{LISTERS} lists of {list_mib} MiB ({count} keys): resident {} MiB before, {} MiB at most, {:.1?}, {:.1} s of CPU",
        before >> 10,
        most >> 10,
        began.elapsed(),
        cpu() - cpu_before,
    );
    assert!(most.saturating_sub(before) < MAY_GROW_MIB << 10, "grew from {before} KiB to {most} KiB");
}

/// `name` of a gate in the server's metrics.
fn gate(server: &Server, gate: &str, name: &str) -> u64 {
    let text = common::http_get(server.client_port, "/metrics").expect("metrics");
    let line = text.lines().find(|line| line.starts_with(&format!("{name}{{gate=\"{gate}\"}}")));
    line.and_then(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).expect("a number") as u64
}

/// Waits until `done`.
async fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn by_key_descending() -> RangeRequest {
    RangeRequest { sort_order: 2, ..everything() }
}

/// How long a list may take while others are not read: a moment, and what a loaded machine adds.
const SOON: Duration = Duration::from_secs(5);

#[tokio::test]
async fn clients_that_do_not_read_keep_no_long_read_waiting() {
    const CLIENTS: usize = 80;
    const KEYS: usize = 128;
    let server = start();
    let mut client = Client::connect(&server).await;
    fill(&mut client, KEYS, 64 << 10).await;
    let before = memory(&server, "VmRSS");
    let mut unread = Vec::new();
    for _ in 0..CLIENTS {
        unread.push(begin(channel(&server).await, &everything()).await.expect("the answer begins"));
    }
    // Parts of streams take from the same memory.
    let mut unread_parts = Vec::new();
    for _ in 0..CLIENTS {
        let mut kv = Client::connect(&server).await.kv.max_decoding_message_size(usize::MAX);
        unread_parts.push(kv.range_stream(everything()).await.expect("a stream").into_inner());
    }
    until("memory of pieces is taken", || gate(&server, "answer_pieces", "actd_gate_bytes_used") > 60 << 20).await;

    let list = tokio::time::timeout(SOON, whole(channel(&server).await, &everything())).await;
    assert_eq!(list.expect("in time").expect("an answer").kvs.len(), KEYS);
    let mut other = Client::connect(&server).await.kv.max_decoding_message_size(usize::MAX);
    let parts = tokio::time::timeout(SOON, async {
        let (mut parts, mut keys) = (other.range_stream(everything()).await?.into_inner(), 0);
        while let Some(part) = parts.message().await? {
            keys += part.range_response.expect("a part has an answer").kvs.len();
        }
        Ok::<_, Status>(keys)
    });
    assert_eq!(parts.await.expect("in time").expect("a stream"), KEYS);
    let sorted = tokio::time::timeout(SOON, whole(channel(&server).await, &by_key_descending())).await;
    assert_eq!(sorted.expect("in time").expect("an answer").kvs.len(), KEYS);
    let grown = memory(&server, "VmHWM").saturating_sub(before) >> 10;
    assert!(grown < MAY_GROW_MIB, "grew by {grown} MiB");

    // Those who read late have missed nothing.
    for mut stream in unread {
        let message = stream.message().await.expect("an answer").expect("one message");
        assert_eq!(RangeResponse::decode(message).expect("a range response").kvs.len(), KEYS);
    }
    for mut parts in unread_parts {
        let mut keys = 0;
        while let Some(part) = parts.message().await.expect("a part") {
            keys += part.range_response.expect("a part has an answer").kvs.len();
        }
        assert_eq!(keys, KEYS);
    }
    until("memory is given back", || gate(&server, "answer_pieces", "actd_gate_bytes_used") == 0).await;
}

#[tokio::test]
async fn whole_answers_that_nobody_takes_are_bounded_and_make_room() {
    const CLIENTS: usize = 3;
    const KEYS: usize = 48 << 4;
    let server = start();
    let mut client = Client::connect(&server).await;
    fill(&mut client, KEYS, 64 << 10).await;
    let used = |server: &Server| gate(server, "answers_whole", "actd_gate_bytes_used");
    // One that waits for nobody stays, whoever is slow.
    let mut slow = begin(channel(&server).await, &by_key_descending()).await.expect("the answer begins");
    assert_eq!(used(&server), 64 << 20, "the room is kept until the answer is sent");
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(used(&server), 64 << 20, "nobody needs it");
    let message = slow.message().await.expect("an answer").expect("one message");
    assert_eq!(RangeResponse::decode(message).expect("a range response").kvs.len(), KEYS);
    until("room is given back", || used(&server) == 0).await;

    let before = memory(&server, "VmRSS");
    let mut unread = Vec::new();
    for _ in 0..CLIENTS {
        // It begins when the one before it has made room.
        unread.push(begin(channel(&server).await, &by_key_descending()).await.expect("the answer begins"));
    }
    let sorted = tokio::time::timeout(SOON, whole(channel(&server).await, &by_key_descending())).await;
    assert_eq!(sorted.expect("in time").expect("an answer").kvs.len(), KEYS);
    for mut stream in unread {
        let error = stream.message().await.expect_err("cut off");
        // Clients find the end of the stream in the middle of a message.
        assert!(matches!(error.code(), Code::Unavailable | Code::Internal), "{error}");
    }
    let grown = memory(&server, "VmHWM").saturating_sub(before) >> 10;
    assert!(grown < MAY_GROW_MIB, "grew by {grown} MiB");
    until("room is given back", || used(&server) == 0).await;
}

#[tokio::test]
async fn whole_answers_that_are_given_up_stay_within_the_memory_of_all() {
    const MIB: u64 = 80;
    const KEYS: usize = (MIB as usize) << 4;
    let server = start();
    let mut client = Client::connect(&server).await;
    fill(&mut client, KEYS, 64 << 10).await;
    let before = memory(&server, "VmRSS");
    let channel = channel(&server).await;
    for n in 0..100 {
        // Giving up resets the stream, in the middle of the read.
        let patience = Duration::from_millis(2 + n % 7);
        let _ = tokio::time::timeout(patience, begin(channel.clone(), &by_key_descending())).await;
    }
    let sorted = tokio::time::timeout(SOON, whole(channel, &by_key_descending())).await;
    assert_eq!(sorted.expect("in time").expect("an answer").kvs.len(), KEYS);
    let grown = memory(&server, "VmHWM").saturating_sub(before) >> 10;
    // One at a time, its records and their encoding.
    assert!(grown < 2 * MIB + 100, "grew by {grown} MiB");
    let used = || gate(&server, "answers_whole", "actd_gate_bytes_used");
    until("room is given back", || used() == 0).await;
}
