//! `/metrics` beside the table of etcd's metrics: what both have is of the same type, with the same labels and buckets.

mod common;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use actd::pb::etcdserverpb::{
    CompactionRequest, DefragmentRequest, HashKvRequest, HashRequest, LeaseGrantRequest, PutRequest, RangeRequest,
    SnapshotRequest,
};
use common::{Client, Server};

/// What we do not have, and why.
const NOT_OURS: &[(&str, &[&str])] = &[
    (
        "bbolt's commit has phases that our store does not have",
        &[
            "etcd_debugging_disk_backend_commit_rebalance_duration_seconds",
            "etcd_debugging_disk_backend_commit_spill_duration_seconds",
            "etcd_debugging_disk_backend_commit_write_duration_seconds",
            "etcd_debugging_mvcc_index_compaction_pause_duration_milliseconds",
            "etcd_debugging_mvcc_db_compaction_keys_total",
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
    (
        "not there yet",
        &[
            "etcd_mvcc_txn_total",
            "etcd_network_client_grpc_received_bytes_total",
            "etcd_network_client_grpc_sent_bytes_total",
            "etcd_network_server_stream_failures_total",
            "etcd_server_client_requests_total",
            "etcd_server_learner_promote_failures",
            "grpc_server_msg_received_total",
            "grpc_server_msg_sent_total",
            "grpc_server_handling_seconds",
        ],
    ),
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

#[tokio::test]
async fn metrics_are_those_of_the_table() {
    let program = common::server_under_test(env!("CARGO_BIN_EXE_actd"));
    let server = Server::start(Path::new(&program), &[]);
    let mut client = Client::connect(&server).await;
    // Something of everything, so that families with labels have samples.
    client.kv.put(PutRequest { key: "k".into(), ..Default::default() }).await.expect("a put");
    client.kv.range(RangeRequest { key: "k".into(), ..Default::default() }).await.expect("a range");
    client.lease.lease_grant(LeaseGrantRequest { ttl: 60, id: 0 }).await.expect("a lease");
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
