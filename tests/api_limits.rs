//! Requests over the limits and malformed ones get etcd's status and text; clients that vanish leave nothing behind
//! (G-10, G-11, H-57, W-1, W-11; transport rows of the error table).

mod common;

use std::{
    io::{ErrorKind, Read, Write},
    net::TcpStream,
    path::PathBuf,
    time::{Duration, Instant},
};

use actd::pb::etcdserverpb::{
    LeaseKeepAliveRequest, MemberAddRequest, PutRequest, RangeRequest, SnapshotRequest, WatchCancelRequest,
    WatchCreateRequest, WatchRequest, watch_request::RequestUnion,
};
use bytes::Bytes;
use common::{
    Client, Server,
    raw::{RawCodec, channel},
};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Code, Status};

const PATIENCE: Duration = Duration::from_secs(30);

fn program() -> PathBuf {
    common::server_under_test(env!("CARGO_BIN_EXE_actd"))
}

fn start(flags: &[&str]) -> Server {
    Server::start(&program(), flags)
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

async fn raw_call(server: &Server, path: &'static str, message: &'static [u8]) -> Result<Bytes, Status> {
    let mut grpc = tonic::client::Grpc::new(channel(server).await);
    grpc.ready().await.expect("ready");
    let path = http::uri::PathAndQuery::from_static(path);
    let request = tonic::Request::new(Bytes::from_static(message));
    grpc.unary(request, path, RawCodec).await.map(tonic::Response::into_inner)
}

/// The head of an answer to a message that is not compressed, whatever its encoding would be, and the answer's data.
async fn data_of(
    server: &Server,
    path: &str,
    encoding: &str,
    message: &impl prost::Message,
) -> (http::HeaderMap, Vec<u8>) {
    let message = message.encode_to_vec();
    let data = [[0].as_slice(), &(message.len() as u32).to_be_bytes(), &message].concat();
    let request = http::Request::post(format!("{}{path}", server.endpoint()))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("grpc-encoding", encoding)
        .body(tonic::body::Body::new(http_body_util::Full::new(Bytes::from(data))))
        .expect("a request");
    let mut channel = channel(server).await;
    std::future::poll_fn(|cx| tower_service::Service::<http::Request<_>>::poll_ready(&mut channel, cx))
        .await
        .expect("ready");
    let (head, body) = tower_service::Service::call(&mut channel, request).await.expect("an answer").into_parts();
    let data = http_body_util::BodyExt::collect(body).await.expect("data").to_bytes();
    (head.headers, data.to_vec())
}

fn put(bytes: usize) -> PutRequest {
    PutRequest { key: "k".into(), value: vec![b'x'; bytes].into(), ..Default::default() }
}

/// Waits until a metric has the value.
fn until_metric(server: &Server, name: &str, value: f64) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let now = server.metric(name);
        if now == Some(value) {
            return;
        }
        assert!(Instant::now() < deadline, "{name} is {now:?}, not {value}");
        common::pause();
    }
}

#[test]
fn requests_over_the_limits_get_etcds_status() {
    let server = start(&[]);
    runtime().block_on(async {
        let mut client = Client::connect(&server).await;
        // G-10: the encoded proposal.
        let status = client.kv.put(put(1_572_864)).await.expect_err("too large");
        assert_eq!((status.code(), status.message()), (Code::InvalidArgument, "etcdserver: request is too large"));
        // G-11: the message itself.
        let status = client.kv.put(put(2_200_000)).await.expect_err("larger than any message");
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert!(
            status.message().starts_with("grpc: received message larger than max (22000")
                && status.message().ends_with(" vs. 2097152)"),
            "{}",
            status.message()
        );
        client.kv.put(put(1_500_000)).await.expect("below both limits");
        // An answer has no limit of the server's.
        let range = RangeRequest { key: "k".into(), ..Default::default() };
        assert_eq!(client.kv.range(range).await.expect("a read").into_inner().kvs.len(), 1);
    });
}

#[test]
fn malformed_messages_and_unknown_paths_get_grpcs_texts() {
    let server = start(&[]);
    runtime().block_on(async {
        let status = raw_call(&server, "/etcdserverpb.KV/Put", b"\x0a\xff").await.expect_err("cut short");
        assert_eq!(status.code(), Code::Internal);
        assert_eq!(status.message(), "grpc: error unmarshalling request: proto: cannot parse invalid wire-format data");
        let status = raw_call(&server, "/etcdserverpb.Cluster/MemberAdd", b"\x0a\x01\xff").await.expect_err("no text");
        let text = "grpc: error unmarshalling request: string field contains invalid UTF-8";
        assert_eq!((status.code(), status.message()), (Code::Internal, text));

        let status = raw_call(&server, "/etcdserverpb.Nothing/Put", b"").await.expect_err("no such service");
        assert_eq!((status.code(), status.message()), (Code::Unimplemented, "unknown service etcdserverpb.Nothing"));

        let status = raw_call(&server, "/etcdserverpb.KV/Nothing", b"").await.expect_err("no such method");
        assert_eq!(
            (status.code(), status.message()),
            (Code::Unimplemented, "unknown method Nothing for service etcdserverpb.KV")
        );

        let status = raw_call(&server, "/etcdserverpb.KV/Put", b"").await.expect_err("an empty key");
        assert_eq!((status.code(), status.message()), (Code::InvalidArgument, "etcdserver: key is not provided"));

        // Services that are not there yet say so.
        for path in ["/v3lockpb.Lock/Lock", "/etcdserverpb.Auth/UserAdd", "/v3electionpb.Election/Campaign"] {
            let status = raw_call(&server, path, b"").await.expect_err("not yet");
            assert_eq!(status.code(), Code::Unimplemented, "{path}");
            assert!(status.message().starts_with("not implemented: "), "{path}: {}", status.message());
        }
    });
}

fn create() -> WatchRequest {
    let create = WatchCreateRequest { key: "k".into(), ..Default::default() };
    WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) }
}

#[test]
fn two_thousand_streams_on_one_connection_and_none_left_when_it_goes() {
    let server = start(&[]);
    let runtime = runtime();
    runtime.block_on(async {
        let client = Client::connect(&server).await;
        let mut streams = Vec::new();
        for _ in 0..2_000 {
            let (requests, outgoing) = tokio::sync::mpsc::unbounded_channel();
            requests.send(create()).expect("just opened");
            let mut watch = client.watch.clone();
            let mut stream = watch.watch(UnboundedReceiverStream::new(outgoing)).await.expect("a stream").into_inner();
            let created = tokio::time::timeout(PATIENCE, stream.message()).await.expect("in time");
            assert!(created.expect("no error").expect("an answer").created);
            streams.push((requests, stream));
        }
        until_metric(&server, "etcd_debugging_mvcc_watch_stream_total", 2_000.0);
        let mut kv = client.kv.clone();
        kv.put(put(3)).await.expect("a put");
        for (_, stream) in &mut streams {
            let event = tokio::time::timeout(PATIENCE, stream.message()).await.expect("in time");
            assert_eq!(event.expect("no error").expect("an event").events.len(), 1);
        }
    });
    // The client vanishes with all its streams.
    drop(runtime);
    until_metric(&server, "etcd_debugging_mvcc_watch_stream_total", 0.0);
    until_metric(&server, "etcd_debugging_mvcc_watcher_total", 0.0);
    assert_eq!(server.metric("actd_gate_slots_used{gate=\"proposals\"}"), Some(0.0));
}

#[test]
fn half_closed_stream_goes_on_and_created_watchers_can_be_cancelled() {
    let server = start(&[]);
    runtime().block_on(async {
        let mut client = Client::connect(&server).await;
        // W-11: the requests' side ends, the events go on.
        let only = tokio_stream::iter([create()]);
        let mut stream = client.watch.watch(only).await.expect("a stream").into_inner();
        assert!(stream.message().await.expect("no error").expect("an answer").created);
        client.kv.put(put(1)).await.expect("a put");
        assert_eq!(stream.message().await.expect("no error").expect("an event").events.len(), 1);
        drop(stream);

        // H-57: many pairs of create and cancel leave no watcher.
        let (requests, outgoing) = tokio::sync::mpsc::unbounded_channel();
        let mut stream =
            client.watch.watch(UnboundedReceiverStream::new(outgoing)).await.expect("a stream").into_inner();
        for watch_id in 0..5_000 {
            requests.send(create()).expect("open");
            let cancel = WatchCancelRequest { watch_id };
            let request = WatchRequest { request_union: Some(RequestUnion::CancelRequest(cancel)) };
            requests.send(request).expect("open");
        }
        for answer in 0..10_000 {
            let response = tokio::time::timeout(PATIENCE, stream.message()).await.expect("in time");
            let response = response.expect("no error").expect("an answer");
            assert_eq!((response.watch_id, response.canceled), (answer / 2, answer % 2 == 1));
        }
        until_metric(&server, "etcd_debugging_mvcc_watcher_total", 0.0);
    });
}

#[test]
fn stream_limit_holds_when_it_is_set() {
    let server = start(&["--max-concurrent-streams=3"]);
    runtime().block_on(async {
        let client = Client::connect(&server).await;
        let mut held = Vec::new();
        for _ in 0..3 {
            let (requests, outgoing) = tokio::sync::mpsc::unbounded_channel::<WatchRequest>();
            requests.send(create()).expect("just opened");
            let mut watch = client.watch.clone();
            held.push((requests, watch.watch(UnboundedReceiverStream::new(outgoing)).await.expect("a stream")));
        }
        let mut kv = client.kv.clone();
        let range = RangeRequest { key: "k".into(), ..Default::default() };
        let fourth = tokio::time::timeout(Duration::from_millis(500), kv.range(range)).await;
        assert!(fourth.is_err(), "a fourth stream waits for its turn: {fourth:?}");
    });
}

#[test]
fn two_servers_on_one_port_are_refused() {
    let server = start(&[]);
    let folder = tempfile::tempdir().expect("a folder");
    let output = std::process::Command::new(program())
        .args(["--data-dir", &folder.path().display().to_string()])
        .args(["--listen-client-urls", &server.endpoint(), "--advertise-client-urls", &server.endpoint()])
        .output()
        .expect("it runs");
    assert_eq!(output.status.code(), Some(1));
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(log.contains("cannot listen on") && log.contains("in use"), "{log}");
}

#[test]
fn second_process_on_one_data_directory_is_refused() {
    let server = start(&[]);
    // D-28
    let [port] = common::free_ports();
    let endpoint = format!("http://127.0.0.1:{port}");
    let data = std::fs::read_dir(server.folder())
        .expect("the server's folder")
        .map(|entry| entry.expect("an entry").path())
        .find(|path| path.join("member").is_dir())
        .expect("a data directory");
    let output = std::process::Command::new(program())
        .args(["--data-dir", &data.display().to_string()])
        .args(["--listen-client-urls", &endpoint, "--advertise-client-urls", &endpoint])
        .output()
        .expect("it runs");
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(log.contains("lock") || log.contains("in use") || log.contains("another process"), "{log}");
}

#[test]
fn held_connections_leave_the_log_its_descriptors() {
    let program = program();
    let [metrics, _] = common::free_ports();
    let listen_metrics = format!("--listen-metrics-urls=http://127.0.0.1:{metrics}");
    let mut server = Server::start_with_open_files(&program, 200, &[&listen_metrics]);
    runtime().block_on(async {
        let mut client = Client::connect(&server).await;
        client.kv.put(put(1)).await.expect("a put before");
        let connect = |port| TcpStream::connect(("127.0.0.1", port)).expect("the kernel's queue has room");
        let held: Vec<TcpStream> = (0..400).map(|_| connect(server.client_port)).collect();
        let of_members: Vec<TcpStream> = (0..200).map(|_| connect(server.peer_port)).collect();
        // More than a segment of the log: a new file, and a look at the directory.
        for _ in 0..80 {
            client
                .kv
                .put(put(1_000_000))
                .await
                .unwrap_or_else(|e| panic!("a put beside: {e}\n{}", server.stderr_tail()));
        }
        // Metrics have places of their own.
        for path in ["/metrics", "/health"] {
            assert!(common::http_get(metrics, path).is_some_and(|text| !text.is_empty()), "{path}");
        }
        drop((held, of_members));
        // The places are free again.
        let again = tokio::time::timeout(PATIENCE, Client::connect(&server)).await.expect("in time");
        again.clone().kv.put(put(1)).await.expect("a put of a new connection");
    });
    let full = server.stderr_tail().matches("all places for client connections are taken").count();
    assert!((1..=3).contains(&full), "told {full} times");
    assert_eq!(
        std::os::unix::process::ExitStatusExt::signal(&server.terminate()),
        Some(rustix::process::Signal::TERM.as_raw())
    );
}

/// One of the calls that hold something of the server's while they run; streams end after their first answer.
async fn some_call(mut client: Client, which: u64) -> Result<(), Status> {
    let large = RangeRequest { key: "large".into(), ..Default::default() };
    match which % 5 {
        0 => drop(client.kv.range(large).await?),
        1 => drop(client.kv.put(PutRequest { key: "other".into(), ..Default::default() }).await?),
        2 => {
            let asks = tokio_stream::iter([LeaseKeepAliveRequest { id: 1 }]);
            client.lease.lease_keep_alive(asks).await?.into_inner().message().await?;
        }
        3 => drop(client.kv.range_stream(large).await?.into_inner().message().await?),
        _ => drop(client.maintenance.snapshot(SnapshotRequest {}).await?.into_inner().message().await?),
    }
    Ok(())
}

#[test]
fn a_hundred_callers_that_give_up_leave_their_connection_alone() {
    let server = start(&[]);
    // With a second member raft is asked before a read.
    let mut second = Server::stopped_in(&std::env::temp_dir(), &program(), &[]);
    let rt = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    rt.block_on(async {
        let channel = channel(&server).await;
        let mut client = Client::over(channel.clone());
        let [ours, theirs] = [&server, &second].map(|member| format!("http://127.0.0.1:{}", member.peer_port));
        let add = MemberAddRequest { peer_ur_ls: vec![theirs.clone()], is_learner: false };
        client.cluster.member_add(add).await.expect("a second member");
        second.join("m1", &format!("m0={ours},m1={theirs}"));
        let large = PutRequest { key: "large".into(), value: vec![b'x'; 300_000].into(), ..Default::default() };
        client.kv.put(large).await.expect("more than is sent at once");
        let (requests, inbox) = tokio::sync::mpsc::unbounded_channel();
        let create = WatchCreateRequest { key: "k".into(), ..Default::default() };
        let request = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
        requests.send(request).expect("open");
        let mut events = client.watch.watch(UnboundedReceiverStream::new(inbox)).await.expect("a watch").into_inner();
        assert!(events.message().await.expect("open").expect("an answer").created);

        let callers = (0..100_u64).map(|caller| {
            let client = client.clone();
            tokio::spawn(async move {
                // The client's own library ends a connection on which it has given up a thousand calls.
                for call in 0..9 {
                    let patience = Duration::from_micros((caller * 7919 + call * 104_729) % 2_000);
                    // Giving up resets the stream.
                    if let Ok(Err(status)) = tokio::time::timeout(patience, some_call(client.clone(), call)).await {
                        panic!("neither answered nor given up: {status}");
                    }
                }
            })
        });
        for caller in callers.collect::<Vec<_>>() {
            caller.await.expect("nobody was cut off");
        }
        client.kv.put(put(1)).await.expect("a put on the same connection");
        let event = tokio::time::timeout(PATIENCE, events.message()).await.expect("in time");
        assert_eq!(event.expect("the watch lives").expect("an answer").events.len(), 1);
        // Others are on their way when the connection goes.
        for call in 0..100 {
            tokio::spawn(some_call(client.clone(), call));
        }
        tokio::task::yield_now().await;
    });
    drop(rt);
    for gate in ["proposals", "reads", "answer_pieces", "answers_whole"] {
        until_metric(&server, &format!("actd_gate_slots_used{{gate=\"{gate}\"}}"), 0.0);
    }
    until_metric(&server, "etcd_mvcc_db_open_read_transactions", 0.0);
}

#[test]
fn cancelled_watch_ends_as_cancelled() {
    // W-12
    let server = start(&[]);
    let ended = "grpc_server_handled_total{grpc_code=\"Canceled\",grpc_method=\"Watch\",\
                 grpc_service=\"etcdserverpb.Watch\",grpc_type=\"bidi_stream\"}";
    let rt = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    rt.block_on(async {
        let mut client = Client::connect(&server).await;
        let create = WatchCreateRequest { key: "k".into(), ..Default::default() };
        let (requests, inbox) = tokio::sync::mpsc::unbounded_channel();
        requests.send(WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) }).expect("open");
        let mut events = client.watch.watch(UnboundedReceiverStream::new(inbox)).await.expect("a watch").into_inner();
        assert!(events.message().await.expect("open").expect("an answer").created);
        assert_eq!(server.metric(ended).unwrap_or(0.0), 0.0);
        drop((events, requests));
        until_metric(&server, ended, 1.0);
        until_metric(&server, "etcd_debugging_mvcc_watcher_total", 0.0);
    });
}

#[test]
fn calls_that_were_given_up_have_ended() {
    let server = start(&[]);
    let rt = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    rt.block_on(async {
        let client = Client::connect(&server).await;
        let callers = (0..500_u64).map(|caller| {
            let mut kv = client.kv.clone();
            let patience = Duration::from_micros(caller * 7919 % 2_000);
            tokio::spawn(async move { tokio::time::timeout(patience, kv.put(put(1))).await })
        });
        for caller in callers.collect::<Vec<_>>() {
            let _ = caller.await.expect("no panic");
        }
    });
    let puts = || -> Vec<(String, f64)> {
        let text = common::http_get(server.client_port, "/metrics").expect("metrics");
        let of_puts = text.lines().filter(|line| line.contains("grpc_method=\"Put\",grpc_service=\"etcdserverpb.KV\""));
        let parse = |(name, value): (&str, &str)| (name.to_owned(), value.parse().expect("a number"));
        of_puts.filter_map(|line| line.rsplit_once(' ').map(parse)).filter(|(_, count)| *count > 0.0).collect()
    };
    let sum = |puts: &[(String, f64)], of: &str| -> f64 {
        puts.iter().filter(|(name, _)| name.starts_with(of)).map(|(_, count)| count).sum()
    };
    let deadline = Instant::now() + PATIENCE;
    let ended = loop {
        let puts = puts();
        if sum(&puts, "grpc_server_started_total") == sum(&puts, "grpc_server_handled_total") {
            break puts;
        }
        assert!(Instant::now() < deadline, "{puts:?}");
        common::pause();
    };
    let answered = sum(&ended, "grpc_server_handled_total{grpc_code=\"OK\"");
    assert!(answered < sum(&ended, "grpc_server_started_total"), "nobody gave up in time: {ended:?}");
}

#[test]
fn calls_for_one_request_refuse_none_and_many() {
    let server = start(&[]);
    runtime().block_on(async {
        let channel = channel(&server).await;
        let said = async |path: &'static str, messages: &[&'static [u8]]| {
            let mut grpc = tonic::client::Grpc::new(channel.clone());
            grpc.ready().await.expect("ready");
            let path = http::uri::PathAndQuery::from_static(path);
            let messages: Vec<_> = messages.iter().map(|m| Bytes::from_static(m)).collect();
            let request = tonic::Request::new(tokio_stream::iter(messages));
            let ended = async {
                let mut stream = grpc.streaming(request, path, RawCodec).await?.into_inner();
                while stream.message().await?.is_some() {}
                Ok::<_, Status>(())
            };
            ended.await.map_or_else(|e| format!("{:?}: {}", e.code(), e.message()), |()| "fine".to_owned())
        };
        let get: &[u8] = b"\x0a\x01k";
        assert_eq!(said("/etcdserverpb.KV/Range", &[]).await, "Unknown: EOF");
        assert_eq!(said("/etcdserverpb.KV/Range", &[get, get]).await, "fine");
        let bad = "Internal: grpc: failed to unmarshal the received message: \
                   proto: cannot parse invalid wire-format data";
        for path in ["/etcdserverpb.Lease/LeaseKeepAlive", "/etcdserverpb.Watch/Watch"] {
            assert_eq!(said(path, &[b"\xff\xff"]).await, bad, "{path}");
        }
        for path in ["/etcdserverpb.KV/RangeStream", "/etcdserverpb.Maintenance/Snapshot"] {
            let none = "Internal: cardinality violation: received no request message from non-client-streaming RPC";
            assert_eq!(said(path, &[]).await, none, "{path}");
            let many =
                "Internal: cardinality violation: received multiple request messages for non-client-streaming RPC";
            assert_eq!(said(path, &[get, get]).await, many, "{path}");
            assert_eq!(said(path, &[b"\xff\xff"]).await, bad, "{path}");
        }
        assert_eq!(said("/etcdserverpb.KV/RangeStream", &[get]).await, "fine");
    });
}

#[test]
fn compressed_requests_are_taken_and_answered_alike() {
    use tonic::codec::CompressionEncoding::Gzip;
    let server = start(&[]);
    runtime().block_on(async {
        let plain = Client::connect(&server).await.kv;
        let mut compressed = plain.clone().send_compressed(Gzip).accept_compressed(Gzip);
        compressed.put(put(5_000)).await.expect("a put");
        let get = RangeRequest { key: "k".into(), ..Default::default() };
        let encoding =
            |answer: &tonic::Response<_>| answer.metadata().get("grpc-encoding").map(|e| e.as_bytes().to_vec());
        let answer = compressed.range(get.clone()).await.expect("an answer");
        assert_eq!(encoding(&answer), Some(b"gzip".to_vec()));
        assert_eq!(answer.get_ref().kvs[0].decode_record().expect("a record").value.len(), 5_000);
        // What a client would take does not matter, what it sent does.
        let answer = plain.clone().accept_compressed(Gzip).range(get.clone()).await.expect("an answer");
        assert_eq!(encoding(&answer), None);
        let mut parts = compressed.range_stream(get.clone()).await.expect("a stream").into_inner();
        let part = parts.message().await.expect("a part").expect("a part").range_response.expect("an answer");
        assert_eq!(part.kvs[0].decode_record().expect("a record").value.len(), 5_000);
        for path in ["/etcdserverpb.KV/Range", "/etcdserverpb.KV/RangeStream"] {
            for (encoding, flag) in [("gzip", 1), ("identity", 0)] {
                let (headers, data) = data_of(&server, path, encoding, &get).await;
                assert_eq!((data[0], data.len() < 5_000), (flag, flag == 1), "{path} {encoding}");
                // HTTP alone says it.
                assert_eq!(headers.get("date"), None, "{path}");
            }
        }

        // G-11 holds for what comes out.
        let status = compressed.put(put(2_200_000)).await.expect_err("larger than any message");
        let text = "grpc: received message after decompression larger than max 2097152";
        assert_eq!((status.code(), status.message()), (Code::ResourceExhausted, text));
        let status = compressed.put(put(1_572_864)).await.expect_err("too large");
        assert_eq!((status.code(), status.message()), (Code::InvalidArgument, "etcdserver: request is too large"));

        let mut unknown = tonic::Request::new(get);
        unknown.metadata_mut().insert("grpc-encoding", "deflate".parse().expect("a value"));
        let status = plain.clone().range(unknown).await.expect_err("unknown");
        let text = "grpc: Decompressor is not installed for grpc-encoding \"deflate\"";
        assert_eq!((status.code(), status.message()), (Code::Unimplemented, text));
    });
}

#[test]
fn a_client_that_pings_too_often_is_told_and_disconnected() {
    const PREFACE_AND_SETTINGS: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    const PING: &[u8] = b"\0\0\x08\x06\0\0\0\0\0pingping";
    const PINGS: u8 = 6;
    const GOAWAY: u8 = 7;
    // The first ping is never too early, and two that are are let pass.
    const ALLOWED: usize = 3;
    let server = start(&[]);
    let address = server.endpoint();
    let mut socket = TcpStream::connect(address.trim_start_matches("http://")).expect("the server listens");
    socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    socket.write_all(PREFACE_AND_SETTINGS).expect("it is taken");
    let mut reader = socket.try_clone().expect("two hands");
    let mut until = |wanted: u8| loop {
        let mut head = [0; 9];
        reader.read_exact(&mut head).expect("a frame in time");
        let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
        reader.read_exact(&mut payload).expect("all of it");
        if head[3] == wanted {
            return payload;
        }
    };
    for _ in 0..ALLOWED {
        socket.write_all(PING).expect("it is taken");
        assert_eq!(until(PINGS), b"pingping");
    }
    socket.write_all(PING).expect("it is taken");
    let last_words = until(GOAWAY);
    assert_eq!(last_words[4..], [&[0, 0, 0, 11][..], b"too_many_pings"].concat(), "ENHANCE_YOUR_CALM");
    let mut rest = Vec::new();
    let ended = reader.read_to_end(&mut rest);
    let is_timeout = ended.is_err_and(|e| matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut));
    assert!(!is_timeout, "the connection ends");
    // Nobody else is disturbed.
    runtime().block_on(async { raw_call(&server, "/etcdserverpb.KV/Put", b"\x0a\x01k").await.expect("a put") });
}
