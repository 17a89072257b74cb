//! `/metrics` beside the table of etcd's metrics: what both have is of the same type, with the same labels and buckets.

mod common;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use actd::pb::etcdserverpb::{
    CompactionRequest, DefragmentRequest, HashKvRequest, HashRequest, LeaseGrantRequest, MemberPromoteRequest,
    PutRequest, RangeRequest, SnapshotRequest, WatchCreateRequest, WatchRequest, watch_request::RequestUnion,
};
use common::{Client, Server};
use prost::Message;

/// What we do not have, and why.
const NOT_OURS: &[(&str, &[&str])] = &[
    (
        "bbolt's commit has phases that our store does not have",
        &[
            "etcd_debugging_disk_backend_commit_rebalance_duration_seconds",
            "etcd_debugging_disk_backend_commit_spill_duration_seconds",
            "etcd_debugging_disk_backend_commit_write_duration_seconds",
            "etcd_debugging_mvcc_index_compaction_pause_duration_milliseconds",
        ],
    ),
    (
        "there are no .snap files; the store's own syncs are under actd_",
        &[
            "etcd_debugging_snap_save_marshalling_duration_seconds",
            "etcd_debugging_snap_save_total_duration_seconds",
            "etcd_snap_fsync_duration_seconds",
            "etcd_snap_db_fsync_duration_seconds",
        ],
    ),
    (
        "watch hubs have no send loop for each stream; actors tell their times under actd_",
        &[
            "etcd_debugging_mvcc_pending_events_total",
            "etcd_debugging_server_watch_send_loop_control_stream_duration_seconds",
            "etcd_debugging_server_watch_send_loop_progress_duration_seconds",
            "etcd_debugging_server_watch_send_loop_watch_stream_duration_per_event_seconds",
            "etcd_debugging_server_watch_send_loop_watch_stream_duration_seconds",
        ],
    ),
    (
        "the store of the v2 API is not there",
        &[
            "etcd_debugging_store_expires_total",
            "etcd_debugging_store_reads_failed_total",
            "etcd_debugging_store_reads_total",
            "etcd_debugging_store_watch_requests_total",
            "etcd_debugging_store_watchers",
            "etcd_debugging_store_writes_failed_total",
            "etcd_debugging_store_writes_total",
        ],
    ),
    (
        "the gRPC proxy is another program",
        &[
            "etcd_grpc_proxy_cache_hits_total",
            "etcd_grpc_proxy_cache_keys_total",
            "etcd_grpc_proxy_cache_misses_total",
            "etcd_grpc_proxy_events_coalescing_total",
            "etcd_grpc_proxy_watchers_coalescing_total",
        ],
    ),
    ("this is no Go program", &["etcd_server_go_version"]),
];

#[derive(Debug, Default)]
struct Family {
    kind: String,
    labels: BTreeSet<String>,
    buckets: Vec<f64>,
}

/// Families with the labels and buckets of their samples.
fn families(text: &str) -> BTreeMap<String, Family> {
    let mut families: BTreeMap<String, Family> = BTreeMap::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').expect("name and type");
            families.entry(name.to_owned()).or_default().kind = kind.to_owned();
        } else if !line.starts_with('#') {
            let (name, labels) =
                line.split_once('{').map_or((line.split(' ').next().unwrap_or(""), ""), |(n, l)| (n, l));
            let base = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
            let name = base.filter(|base| families.contains_key(*base)).unwrap_or(name);
            let family = families.get_mut(name).unwrap_or_else(|| panic!("{line} comes before its type"));
            for pair in labels.split_once('}').map_or("", |(inside, _)| inside).split("\",") {
                let Some((label, value)) = pair.split_once("=\"") else { continue };
                let value = value.trim_end_matches('"');
                if label != "le" {
                    family.labels.insert(label.to_owned());
                } else if value != "+Inf" {
                    let bound: f64 = value.parse().expect("a bound");
                    if !family.buckets.contains(&bound) {
                        family.buckets.push(bound);
                    }
                }
            }
        }
    }
    families
}

/// A stream that ends in the middle of its first message.
async fn broken_watch(server: &Server) {
    let channel = tonic::transport::Endpoint::from_shared(server.endpoint()).expect("an address");
    let mut channel = channel.connect().await.expect("a connection");
    let body = tonic::body::Body::new(http_body_util::Full::from(b"\0\0\0\0\x02\xff\xff".as_slice()));
    let mut request = http::Request::post("/etcdserverpb.Watch/Watch");
    request = request.header("content-type", "application/grpc");
    std::future::poll_fn(|cx| tower_service::Service::poll_ready(&mut channel, cx)).await.expect("ready");
    let call = tower_service::Service::call(&mut channel, request.body(body).expect("a request"));
    let answer = call.await.expect("an answer");
    http_body_util::BodyExt::collect(answer.into_body()).await.expect("the end of the stream");
}

/// A sample's value by its family and the texts its labels hold.
fn sample(text: &str, family: &str, labels: &[&str]) -> Option<u64> {
    let mut lines = text.lines().filter(|line| line.split(['{', ' ']).next() == Some(family));
    let line = lines.find(|line| labels.iter().all(|label| line.contains(&format!("=\"{label}\""))))?;
    line.rsplit(' ').next()?.parse().ok()
}

// What a real etcd counts for the same calls.
#[tokio::test]
async fn calls_are_counted_as_etcd_counts_them() {
    let program = common::server_under_test(env!("CARGO_BIN_EXE_actd"));
    let server = Server::start(Path::new(&program), &[]);
    let mut client = Client::connect(&server).await;
    let put = |key: &'static str| PutRequest { key: key.into(), value: "value".into(), ..Default::default() };
    let first = put("k");
    // Health checks are ranges in etcd.
    let text = common::http_get(server.client_port, "/metrics").expect("metrics");
    let ranges = sample(&text, "etcd_mvcc_range_total", &[]).expect("a number");
    let sizes = std::cell::Cell::new((0, 0));
    let add =
        |asked: usize, answered: usize| sizes.set((sizes.get().0 + asked as u64, sizes.get().1 + answered as u64));
    let answer = client.kv.put(first.clone()).await.expect("a put").into_inner();
    add(first.encoded_len(), answer.encoded_len());
    let mut versioned = tonic::Request::new(first.clone());
    versioned.metadata_mut().insert("client-api-version", "3.9".parse().expect("a value"));
    let answer = client.kv.put(versioned).await.expect("a put").into_inner();
    add(first.encoded_len(), answer.encoded_len());
    let bad = PutRequest { ignore_value: true, value: Default::default(), ..put("absent") };
    client.kv.put(bad.clone()).await.expect_err("no such key");
    add(bad.encoded_len(), 0);
    let list = RangeRequest { key: "k".into(), ..Default::default() };
    let answer = client.kv.range(list.clone()).await.expect("a range").into_inner();
    add(list.encoded_len(), answer.encoded_len());
    let (requests, queue) = tokio::sync::mpsc::unbounded_channel();
    let create = WatchCreateRequest { key: "k".into(), ..Default::default() };
    let create = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
    add(create.encoded_len(), 0);
    requests.send(create).expect("a queue");
    let queue = tokio_stream::wrappers::UnboundedReceiverStream::new(queue);
    let mut watch = client.watch.watch(queue).await.expect("a stream").into_inner();
    let created = watch.message().await.expect("a response").expect("a response");
    add(0, created.encoded_len());
    drop((watch, requests));

    const HANDLED: &str = "grpc_server_handled_total";
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    let text = loop {
        let text = common::http_get(server.client_port, "/metrics").expect("metrics");
        if sample(&text, HANDLED, &["Watch", "Canceled"]) == Some(1) {
            break text;
        }
        assert!(std::time::Instant::now() < deadline, "the end of a stream is not counted");
        // The client's connection has work to do, too.
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    };
    let read = |family: &str, labels: &[&str]| sample(&text, family, labels);
    assert_eq!(read("grpc_server_started_total", &["Put"]), Some(3));
    assert_eq!(read(HANDLED, &["Put", "OK"]), Some(2));
    assert_eq!(read(HANDLED, &["Put", "InvalidArgument"]), Some(1));
    assert_eq!(read(HANDLED, &["Put", "Internal"]), Some(0));
    // The end of a stream's requests and an error count as messages.
    assert_eq!(read("grpc_server_msg_received_total", &["Put"]), Some(3));
    assert_eq!(read("grpc_server_msg_sent_total", &["Put"]), Some(3));
    assert_eq!(read("grpc_server_msg_received_total", &["Watch", "bidi_stream"]), Some(2));
    assert_eq!(read("grpc_server_msg_sent_total", &["Watch"]), Some(1));
    assert_eq!(read("etcd_network_client_grpc_received_bytes_total", &[]), Some(sizes.get().0));
    assert_eq!(read("etcd_network_client_grpc_sent_bytes_total", &[]), Some(sizes.get().1));
    assert_eq!(read("etcd_server_client_requests_total", &["unary", "3.9"]), Some(1));
    assert_eq!(read("etcd_server_client_requests_total", &["unary", "unknown"]), Some(3));
    assert_eq!(read("etcd_server_client_requests_total", &["stream", "unknown"]), Some(1));
    assert_eq!(read("etcd_mvcc_put_total", &[]), Some(2));
    // The failed put has looked for its key.
    assert_eq!(read("etcd_mvcc_range_total", &[]), Some(2 + ranges));
    assert_eq!(read("etcd_debugging_mvcc_total_put_size_in_bytes", &[]), Some(12));
}

#[tokio::test]
async fn compaction_goes_at_the_pace_it_is_told() {
    // 100 keys to look at, and as many rows to remove.
    const SLICES: &str = "etcd_debugging_mvcc_db_compaction_pause_duration_milliseconds_count";
    for (flags, slices, least_ms) in
        [(&[][..], 1..=1, 0), (&["--compaction-batch-limit=10", "--compaction-sleep-interval=20ms"], 20..=21, 380)]
    {
        let program = common::server_under_test(env!("CARGO_BIN_EXE_actd"));
        let server = Server::start(Path::new(&program), flags);
        let mut client = Client::connect(&server).await;
        for n in 0..200 {
            let key = format!("{:02}", n % 100);
            client.kv.put(PutRequest { key: key.into(), ..Default::default() }).await.expect("a put");
        }
        let began = std::time::Instant::now();
        client.kv.compact(CompactionRequest { revision: 201, physical: true }).await.expect("a compaction");
        let took = began.elapsed().as_millis();
        let text = common::http_get(server.client_port, "/metrics").expect("metrics");
        let done = sample(&text, SLICES, &[]).expect("a number");
        assert!(slices.contains(&done) && took >= least_ms, "{done} slices in {took} ms");
        assert_eq!(sample(&text, "etcd_debugging_mvcc_db_compaction_keys_total", &[]), Some(100));
    }
}

#[tokio::test]
async fn metrics_are_those_of_the_table() {
    let program = common::server_under_test(env!("CARGO_BIN_EXE_actd"));
    let server = Server::start(Path::new(&program), &["--metrics=extensive"]);
    let mut client = Client::connect(&server).await;
    // Something of everything, so that families with labels have samples.
    client.kv.put(PutRequest { key: "k".into(), ..Default::default() }).await.expect("a put");
    client.kv.range(RangeRequest { key: "k".into(), ..Default::default() }).await.expect("a range");
    client.lease.lease_grant(LeaseGrantRequest { ttl: 60, id: 0 }).await.expect("a lease");
    let unknown = MemberPromoteRequest { id: 1 };
    client.cluster.member_promote(unknown).await.expect_err("no such member");
    broken_watch(&server).await;
    client.maintenance.hash(HashRequest {}).await.expect("a hash");
    client.maintenance.hash_kv(HashKvRequest { revision: 0 }).await.expect("a hash");
    client.kv.compact(CompactionRequest { revision: 2, physical: true }).await.expect("a compaction");
    client.maintenance.defragment(DefragmentRequest {}).await.expect("a defragmentation");
    let mut backup = client.maintenance.snapshot(SnapshotRequest {}).await.expect("a backup").into_inner();
    while backup.message().await.expect("a part").is_some() {}
    for check in ["/livez", "/readyz", "/health"] {
        common::http_get(server.client_port, check).expect("a healthy member");
    }
    let text = common::http_get(server.client_port, "/metrics").expect("metrics");
    let ours = families(&text);

    let absent: BTreeSet<&str> = NOT_OURS.iter().flat_map(|(_, names)| names.iter().copied()).collect();
    let mut wrong = Vec::new();
    for row in include_str!("data/metrics.tsv").lines().skip(1) {
        let fields: Vec<&str> = row.split('\t').collect();
        let (name, kind, labels, buckets) = (fields[0], fields[1], fields[2], fields[3]);
        if name.starts_with("go_") || fields[7] == "no" {
            continue; // of the Go runtime; or not shown by etcd either
        }
        // Peers' families have samples once there are peers; their types are looked at where there are some.
        let of_peers = labels.contains("To") || labels.contains("From") || labels.contains("Local");
        let of_peers = of_peers && name != "etcd_network_known_peers";
        let Some(family) = ours.get(name) else {
            if !absent.contains(name) && !of_peers {
                wrong.push(format!("{name} is missing"));
            }
            continue;
        };
        if absent.contains(name) {
            wrong.push(format!("{name} is there; take it from the list of what is not"));
        }
        if family.kind != kind {
            wrong.push(format!("{name} is a {}, not a {kind}", family.kind));
        }
        let labels: BTreeSet<String> = labels.split(',').filter(|l| !l.is_empty()).map(str::to_owned).collect();
        if !family.labels.is_empty() && family.labels != labels {
            wrong.push(format!("{name} has the labels {:?}, not {labels:?}", family.labels));
        }
        let buckets: Vec<f64> = buckets.split(',').filter_map(|b| b.parse().ok()).collect();
        if kind == "histogram" && !family.buckets.is_empty() && family.buckets != buckets {
            wrong.push(format!("{name} has the buckets {:?}, not {buckets:?}", family.buckets));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
