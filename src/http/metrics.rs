//! `/metrics`: Prometheus text, etcd's names for what means the same, `actd_` for the rest.

use std::{
    io::Write as _,
    sync::{
        PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

use bytes::Bytes;
use flate2::{Compression, write::GzEncoder};
use http::{HeaderValue, Response, header};
use http_body_util::Full;

use super::{Answer, set_type};
use crate::{
    actor::Registry,
    api::Handle,
    config::ETCD_VERSION,
    pb::etcdserverpb::AlarmType,
    storage::Storage,
    telemetry::{Metrics, RpcMethod, Text, Traffic},
};

/// `gzip`: compressed.
pub fn render(handle: &Handle, gzip: bool) -> Answer {
    let mut out = Text::default();
    server(&mut out, handle);
    store(&mut out, handle);
    disk(&mut out, &handle.server.metrics);
    rpcs(&mut out, &handle.server.metrics);
    actors(&mut out, &handle.server.registry);
    process(&mut out);
    scrapes(&mut out, &handle.server.metrics);
    if let Some(links) = handle.server.links() {
        links.render_metrics(&mut out);
    }
    let body = if gzip { compress(out.0.as_bytes()) } else { out.0.into_bytes() };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    if gzip {
        response.headers_mut().insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    }
    set_type(&mut response, "text/plain; version=0.0.4; charset=utf-8; escaping=underscores");
    response
}

fn compress(text: &[u8]) -> Vec<u8> {
    let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
    gzip.write_all(text).and_then(|()| gzip.finish()).expect("a buffer that grows")
}

fn server(out: &mut Text, handle: &Handle) {
    let server = &handle.server;
    let raft = server.raft_status.read();
    let view = server.view.load();
    let status = &server.raft_status;
    out.gauge("etcd_server_has_leader", "1 while a leader is known.", u8::from(raft.leader != 0));
    out.gauge("etcd_server_is_leader", "1 while this member leads.", u8::from(raft.is_leader));
    out.gauge("etcd_server_is_learner", "1 while this member is a learner.", u8::from(raft.is_learner));
    out.counter("etcd_server_leader_changes_seen_total", "Leader changes seen.", &status.leader_changes);
    out.counter(
        "etcd_server_heartbeat_send_failures_total",
        "Heartbeats that could not be sent in time.",
        &status.heartbeat_send_failures,
    );
    out.gauge("etcd_server_proposals_applied_total", "Newest applied log index.", view.applied_index);
    out.gauge("etcd_server_proposals_committed_total", "Newest committed log index.", raft.commit);
    out.gauge(
        "etcd_server_proposals_pending",
        "Proposals that wait to commit.",
        status.proposals_pending.load(Relaxed),
    );
    out.counter("etcd_server_proposals_failed_total", "Proposals that failed.", &status.proposals_failed);
    out.counter("etcd_server_health_success", "Successful health checks.", &server.metrics.health_ok);
    out.counter("etcd_server_health_failures", "Failed health checks.", &server.metrics.health_failed);
    out.gauge(
        "etcd_server_quota_backend_bytes",
        "Effective space quota; 0 without one.",
        server.settings.quota_bytes.unwrap_or(0),
    );
    let id = format!("{:x}", server.settings.member_id);
    out.head("etcd_server_id", "gauge", "1 on the label that holds this member's id.").sample(
        "etcd_server_id",
        &[("server_id", &id)],
        1,
    );
    out.head("etcd_server_version", "gauge", "1 on the label that holds the version.").sample(
        "etcd_server_version",
        &[("server_version", ETCD_VERSION)],
        1,
    );
    if let Some(version) = view.members.cluster_version() {
        let text = version.to_string();
        let minor = text.rsplit_once('.').map_or(text.as_str(), |(minor, _)| minor);
        out.head("etcd_cluster_version", "gauge", "1 on the label that holds the cluster version.").sample(
            "etcd_cluster_version",
            &[("cluster_version", minor)],
            1,
        );
    }
    out.head("etcd_debugging_server_alarms", "gauge", "1 for each active alarm.");
    for alarm in view.alarms.list(AlarmType::None as i32) {
        let kind = AlarmType::try_from(alarm.alarm).map_or("UNKNOWN", |kind| kind.as_str_name());
        let member = format!("{:x}", alarm.member_id);
        out.sample("etcd_debugging_server_alarms", &[("server_id", &member), ("alarm_type", kind)], 1);
    }
    let m = &server.metrics;
    const REQUESTS: &str = "etcd_server_request_duration_seconds";
    out.head(REQUESTS, "histogram", "Time of requests inside the server, by kind.");
    for (kind, success, times) in m.requests.iter() {
        out.times(REQUESTS, &[("type", &kind), ("success", success)], times);
    }
    const APPLIES: &str = "etcd_server_apply_duration_seconds";
    out.head(APPLIES, "histogram", "Time to apply a log entry, by kind.");
    for (kind, success, times) in m.applies.iter() {
        out.times(APPLIES, &[("version", "v3"), ("op", &kind), ("success", success)], times);
    }
    out.counter(
        "etcd_server_slow_apply_total",
        "Entries that took longer than --warning-apply-duration.",
        &m.slow_applies,
    );
    const RANGES: &str = "etcd_server_range_duration_seconds";
    out.head(RANGES, "histogram", "Time of ranges in the store.");
    for (times, success) in m.range_times.iter().zip(["false", "true"]) {
        out.times(RANGES, &[("success", success)], times);
    }
    out.counter("etcd_server_slow_read_indexes_total", "Read rounds that had to be asked for again.", &m.reads_slow);
    out.counter("etcd_server_read_indexes_failed_total", "Linearizable reads that failed.", &m.reads_failed);
    out.counter("etcd_server_learner_promote_successes", "Learners promoted by this leader.", &m.promotions);
    const REFUSED: &str = "etcd_server_learner_promote_failures";
    let refused = m.promotions_refused.lock().unwrap_or_else(PoisonError::into_inner).clone();
    out.head_if(!refused.is_empty(), REFUSED, "counter", "Promotions this leader refused, by reason.");
    for (reason, count) in refused {
        out.sample(REFUSED, &[("Reason", &reason)], count);
    }
    out.gauge(
        "etcd_server_snapshot_apply_in_progress_total",
        "1 while a leader's snapshot is taken on.",
        m.installs_running.load(Relaxed),
    );
    const FEATURES: &str = "etcd_server_feature_enabled";
    out.head(FEATURES, "gauge", "1 for each feature gate that is open.");
    for (name, stage, open) in &server.settings.features {
        out.sample(FEATURES, &[("name", name), ("stage", stage)], u8::from(*open));
    }
    const CHECK: &str = "etcd_server_healthcheck";
    out.head(CHECK, "gauge", "Newest result of each health check.");
    for check in m.checks.iter().filter(|c| c.passed.load(Relaxed) + c.failed.load(Relaxed) > 0) {
        out.sample(CHECK, &[("type", check.family), ("name", check.name)], check.newest.load(Relaxed));
    }
    const CHECKS: &str = "etcd_server_healthchecks_total";
    out.head(CHECKS, "counter", "Runs of each health check.");
    for check in &m.checks {
        for (status, count) in [("success", &check.passed), ("error", &check.failed)] {
            if count.load(Relaxed) > 0 {
                let labels = [("type", check.family), ("name", check.name), ("status", status)];
                out.sample(CHECKS, &labels, count.load(Relaxed));
            }
        }
    }
    const KNOWN: &str = "etcd_network_known_peers";
    out.head(KNOWN, "gauge", "1 for each member.");
    for member in view.members.iter() {
        out.sample(KNOWN, &[("Local", &id), ("Remote", &format!("{:x}", member.id))], 1);
    }
    out.gauge("etcd_debugging_auth_revision", "Revision of users and roles.", 1);
    out.histogram("etcd_debugging_lease_ttl_total", "Times to live of granted leases.", &m.lease_ttls);
    out.counter("etcd_debugging_server_lease_expired_total", "Leases revoked because they ran out.", &m.leases_expired);
    out.counter("etcd_debugging_lease_granted_total", "Leases granted.", &m.leases_granted);
    out.counter("etcd_debugging_lease_revoked_total", "Leases revoked, by request or expiry.", &m.leases_gone);
    out.counter("etcd_debugging_lease_renewed_total", "Keepalives answered with a renewal.", &m.leases_renewed);
}

fn store(out: &mut Text, handle: &Handle) {
    let server = &handle.server;
    let view = server.view.load();
    let m = &server.metrics;
    let keys = view.kv.index.count(crate::mvcc::KeyRange::ALL, view.kv.revision);
    out.gauge("etcd_debugging_mvcc_keys_total", "Live keys.", keys);
    out.gauge("etcd_debugging_mvcc_current_revision", "Current revision.", view.kv.revision);
    out.gauge("etcd_debugging_mvcc_compact_revision", "Newest compact revision.", view.kv.compact_revision);
    out.gauge(
        "etcd_debugging_mvcc_total_put_size_in_bytes",
        "Key and value bytes of all puts since the start.",
        m.put_bytes.load(Relaxed),
    );
    out.counter("etcd_mvcc_put_total", "Put operations.", &m.puts);
    out.counter("etcd_mvcc_delete_total", "Delete operations.", &m.deletes);
    out.counter("etcd_mvcc_range_total", "Looks at ranges, those inside other requests included.", &m.ranges);
    out.counter("etcd_mvcc_txn_total", "Requests with more than one operation.", &m.txns);
    out.counter("etcd_debugging_mvcc_db_compaction_keys_total", "Rows removed by clean-up.", &m.cleaned_rows);
    out.gauge("etcd_mvcc_db_total_size_in_bytes", "Logical size: what the quota looks at.", view.kv.sizes.total);
    out.gauge(
        "etcd_mvcc_db_total_size_in_use_in_bytes",
        "Logical size without what compaction has condemned.",
        view.kv.sizes.in_use,
    );
    out.gauge("etcd_mvcc_db_open_read_transactions", "Backups that hold old rows.", m.backups_running.load(Relaxed));
    out.histogram("etcd_mvcc_hash_duration_seconds", "Time of a hash of all buckets.", &m.hashes);
    out.histogram("etcd_mvcc_hash_rev_duration_seconds", "Time of a hash at a revision.", &m.hashes_at_revision);
    out.histogram(
        "etcd_debugging_mvcc_db_compaction_pause_duration_milliseconds",
        "Time of one slice of clean-up after a compaction.",
        &m.compaction_pauses,
    );
    out.histogram(
        "etcd_debugging_mvcc_db_compaction_total_duration_milliseconds",
        "Time of a whole clean-up after a compaction.",
        &m.compactions,
    );
    out.gauge(
        "etcd_debugging_mvcc_db_compaction_last",
        "When the last clean-up ended, in Unix seconds.",
        m.compaction_last.load(Relaxed),
    );
    out.gauge("actd_store_disk_bytes", "Bytes of the store on disk.", server.storage.disk_bytes());
    out.one(
        "counter",
        "actd_store_blocked_seconds_total",
        "Time commits were held up by the engine, as estimated.",
        server.storage.load().blocked().as_secs_f64(),
    );
    let sum = |of: fn(&crate::telemetry::HubNumbers) -> &AtomicU64| -> u64 {
        m.hubs.iter().map(|hub| of(hub).load(Relaxed)).sum()
    };
    out.gauge("etcd_debugging_mvcc_watch_stream_total", "Open watch streams.", sum(|h| &h.streams));
    out.gauge("etcd_debugging_mvcc_watcher_total", "Open watchers.", sum(|h| &h.watchers));
    out.gauge("etcd_debugging_mvcc_slow_watcher_total", "Watchers that read history.", sum(|h| &h.behind));
    out.one("counter", "etcd_debugging_mvcc_events_total", "Events handed to watchers.", sum(|h| &h.events_sent));
    out.gauge("actd_watch_queued_bytes", "Responses queued for watch streams.", sum(|h| &h.queued_bytes));
}

fn disk(out: &mut Text, m: &Metrics) {
    out.histogram("etcd_disk_wal_fsync_duration_seconds", "Time of one sync of the log.", &m.wal_sync);
    out.histogram("etcd_disk_wal_write_duration_seconds", "Time of one write of the log.", &m.wal_write);
    out.gauge("etcd_disk_wal_write_bytes_total", "Bytes written to the log.", m.wal_bytes.load(Relaxed));
    out.histogram("etcd_disk_backend_commit_duration_seconds", "Time of one batch of the store.", &m.store_commit);
    out.histogram("etcd_disk_backend_snapshot_duration_seconds", "Time to write a backup out.", &m.backups);
    out.histogram("etcd_disk_backend_defrag_duration_seconds", "Time of defragmentations.", &m.defragments);
    out.gauge("etcd_disk_defrag_inflight", "1 while one runs.", m.defragments_running.load(Relaxed).min(1));
    out.histogram(
        "etcd_snap_db_save_total_duration_seconds",
        "Time to take a leader's snapshot in.",
        &m.snapshot_saves,
    );
    out.histogram("actd_store_sync_duration_seconds", "Time of one background sync of the store.", &m.store_sync);
}

fn rpcs(out: &mut Text, m: &Metrics) {
    let sum = |of: fn(&RpcMethod) -> &Traffic| -> u64 { m.rpcs.iter().map(|rpc| of(rpc).bytes.load(Relaxed)).sum() };
    const RECEIVED: &str = "etcd_network_client_grpc_received_bytes_total";
    out.one("counter", RECEIVED, "Bytes of gRPC messages received.", sum(|rpc| &rpc.received));
    const SENT: &str = "etcd_network_client_grpc_sent_bytes_total";
    out.one("counter", SENT, "Bytes of gRPC messages sent.", sum(|rpc| &rpc.sent));
    const BROKEN: &str = "etcd_network_server_stream_failures_total";
    let broken: Vec<_> = ["watch", "lease-keepalive"].into_iter().zip(&m.streams_broken).collect();
    out.head_if(broken.iter().any(|(_, n)| n.load(Relaxed) > 0), BROKEN, "counter", "Streams that broke.");
    for (api, count) in broken.iter().filter(|(_, n)| n.load(Relaxed) > 0) {
        out.sample(BROKEN, &[("Type", "receive"), ("API", api)], count.load(Relaxed));
    }
    const CLIENTS: &str = "etcd_server_client_requests_total";
    let clients: Vec<_> = m.clients.iter().filter(|(_, _, count)| *count > 0).collect();
    out.head_if(!clients.is_empty(), CLIENTS, "counter", "Calls, by the version their client names.");
    for (kind, version, count) in clients {
        out.sample(CLIENTS, &[("type", kind), ("client_api_version", version)], count);
    }

    // As etcd has it: locks and elections are told of once somebody calls them.
    let told = |rpc: &&RpcMethod| !rpc.service.starts_with("v3") || rpc.started.load(Relaxed) > 0;
    let rpcs: Vec<&RpcMethod> = m.rpcs.iter().filter(told).collect();
    type Reading = fn(&RpcMethod) -> &AtomicU64;
    let counters: [(&str, &str, Reading); 3] = [
        ("grpc_server_started_total", "Calls started.", |rpc| &rpc.started),
        ("grpc_server_msg_received_total", "Messages received.", |rpc| &rpc.received.messages),
        ("grpc_server_msg_sent_total", "Messages sent.", |rpc| &rpc.sent.messages),
    ];
    for (name, help, read) in counters {
        out.head(name, "counter", help);
        for rpc in &rpcs {
            out.sample(name, &labels(rpc), read(rpc).load(Relaxed));
        }
    }
    const HANDLED: &str = "grpc_server_handled_total";
    out.head(HANDLED, "counter", "Calls that have ended, by code.");
    for rpc in &rpcs {
        for (code, count) in rpc.handled.iter().enumerate() {
            let code = format!("{:?}", tonic::Code::from(code as i32));
            let code = match code.as_str() {
                // Go spells these its own way.
                "Cancelled" => "Canceled",
                "Ok" => "OK",
                other => other,
            };
            out.sample(HANDLED, &[&labels(rpc)[..], &[("grpc_code", code)]].concat(), count.load(Relaxed));
        }
    }
    const HANDLING: &str = "grpc_server_handling_seconds";
    let timed: Vec<_> = rpcs.iter().filter_map(|rpc| Some((*rpc, rpc.handling.as_ref()?))).collect();
    out.head_if(!timed.is_empty(), HANDLING, "histogram", "Time of calls until their end.");
    for (rpc, times) in timed {
        out.times(HANDLING, &labels(rpc), times);
    }
}

fn labels(rpc: &RpcMethod) -> [(&str, &str); 3] {
    [("grpc_type", rpc.kind), ("grpc_service", &rpc.service), ("grpc_method", &rpc.method)]
}

/// A number of an actor: name, type, help, how to read it.
type Reading = (&'static str, &'static str, &'static str, fn(&crate::actor::stats::Snapshot) -> f64);

const ACTOR: &[Reading] = &[
    ("actd_actor_inbox_messages", "gauge", "Messages in the data lane.", |s| s.depth as f64),
    ("actd_actor_inbox_bytes", "gauge", "Bytes in the data lane.", |s| s.bytes as f64),
    ("actd_actor_inbox_capacity_messages", "gauge", "Messages the data lane may hold.", |s| s.capacity as f64),
    ("actd_actor_inbox_messages_max", "gauge", "Most messages the data lane has held.", |s| s.depth_max as f64),
    ("actd_actor_inbox_oldest_seconds", "gauge", "Age of the oldest message in hand.", |s| s.oldest_seconds),
    ("actd_actor_paused", "gauge", "1 while only the control lane is served.", |s| f64::from(u8::from(s.paused))),
    ("actd_actor_turns_total", "counter", "Turns taken.", |s| s.turns.count as f64),
    ("actd_actor_busy_seconds_total", "counter", "Time spent in turns.", |s| s.turns.seconds),
    ("actd_actor_messages_total", "counter", "Messages served.", |s| s.batch_messages as f64),
    ("actd_actor_batch_messages_max", "gauge", "Most messages in one turn.", |s| s.batch_max as f64),
    ("actd_actor_blocked_seconds_total", "counter", "Time held up by the next hop.", |s| s.blocked.seconds),
    ("actd_actor_doing_seconds", "gauge", "How long the turn under way has lasted; 0 when idle.", |s| s.doing_seconds),
];

fn actors(out: &mut Text, registry: &Registry) {
    let now = Instant::now();
    let all: Vec<_> = registry.actors().iter().map(|actor| actor.snapshot(now)).collect();
    for (name, kind, help, read) in ACTOR {
        out.head(name, kind, help);
        for actor in &all {
            out.sample(name, &[("actor", actor.name)], read(actor));
        }
    }
    for (part, help) in [("wait", "Time messages waited, by kind."), ("service", "Time spent on messages, by kind.")] {
        let name = format!("actd_actor_{part}_seconds");
        out.head(&name, "summary", help);
        for actor in &all {
            for message in &actor.kinds {
                let value = if part == "wait" { message.wait } else { message.service };
                let labels = [("actor", actor.name), ("message", message.name)];
                out.sample(&format!("{name}_sum"), &labels, value.seconds);
                out.sample(&format!("{name}_count"), &labels, value.count);
            }
        }
    }
    out.head("actd_actor_refusals_total", "counter", "Messages turned away or dropped, by reason.");
    for actor in &all {
        for (reason, count) in &actor.refusals {
            out.sample("actd_actor_refusals_total", &[("actor", actor.name), ("reason", reason)], *count);
        }
    }
    let gates = registry.gates();
    type GateReading = fn(&crate::actor::Gate) -> u64;
    let readings: [(&str, &str, &str, GateReading); 5] = [
        ("actd_gate_slots_used", "gauge", "Permits in use.", |g| g.usage().0 as u64),
        ("actd_gate_slots", "gauge", "Permits there are.", |g| g.usage().1 as u64),
        ("actd_gate_bytes_used", "gauge", "Bytes of permits in use.", |g| g.usage_bytes().0 as u64),
        ("actd_gate_bytes", "gauge", "Bytes there are.", |g| g.usage_bytes().1 as u64),
        ("actd_gate_waits_total", "counter", "How often somebody had to wait.", |g| g.waits()),
    ];
    for (name, kind, help, read) in readings {
        out.head(name, kind, help);
        for gate in &gates {
            out.sample(name, &[("gate", gate.name())], read(gate));
        }
    }
}

/// This answer among its kind.
fn scrapes(out: &mut Text, m: &Metrics) {
    let before = m.scrapes.fetch_add(1, Relaxed);
    const SCRAPES: &str = "promhttp_metric_handler_requests_total";
    out.head(SCRAPES, "counter", "Scrapes by status.").sample(SCRAPES, &[("code", "200")], before);
    out.gauge("promhttp_metric_handler_requests_in_flight", "Scrapes under way.", 1);
}

/// Ticks of /proc times per second: fixed on Linux.
const CLOCK_TICKS: f64 = 100.0;

/// What Prometheus clients tell of their process; left out where /proc is not there.
fn process(out: &mut Text) {
    let Ok(stat) = std::fs::read_to_string("/proc/self/stat") else { return };
    // The second field is the name in parentheses, which may hold anything.
    let Some((_, fields)) = stat.rsplit_once(") ") else { return };
    let field = |n: usize| fields.split(' ').nth(n).and_then(|text| text.parse::<f64>().ok()).unwrap_or(0.0);
    let cpu = (field(11) + field(12)) / CLOCK_TICKS;
    out.one("counter", "process_cpu_seconds_total", "User and system time.", cpu);
    out.gauge("process_virtual_memory_bytes", "Virtual memory.", field(20));
    let most = rustix::process::getrlimit(rustix::process::Resource::As).current;
    out.gauge(
        "process_virtual_memory_max_bytes",
        "Most virtual memory; -1 without a limit.",
        most.map_or(-1.0, |n| n as f64),
    );
    let booted = std::fs::read_to_string("/proc/stat")
        .ok()
        .and_then(|text| text.lines().find_map(|line| line.strip_prefix("btime ")?.parse::<f64>().ok()));
    if let Some(booted) = booted {
        out.gauge(
            "process_start_time_seconds",
            "When the process began, in Unix seconds.",
            booted + field(19) / CLOCK_TICKS,
        );
    }
    network(out);
    out.gauge("process_resident_memory_bytes", "Resident memory.", field(21) * 4096.0);
    let open = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    out.gauge("process_open_fds", "Open file descriptors.", open);
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    out.gauge("process_max_fds", "Most file descriptors that may be open.", limit.current.unwrap_or(0));
    out.gauge("os_fd_used", "Open file descriptors.", open);
    out.gauge("os_fd_limit", "Most file descriptors that may be open.", limit.current.unwrap_or(0));
}

/// Bytes of all interfaces of the process's network namespace.
fn network(out: &mut Text) {
    let Ok(devices) = std::fs::read_to_string("/proc/self/net/dev") else { return };
    let (mut received, mut sent) = (0.0, 0.0);
    for (_, numbers) in devices.lines().filter_map(|line| line.split_once(':')) {
        let number =
            |n: usize| numbers.split_whitespace().nth(n).and_then(|text| text.parse::<f64>().ok()).unwrap_or(0.0);
        received += number(0);
        sent += number(8);
    }
    out.one("counter", "process_network_receive_bytes_total", "Bytes received over the network.", received);
    out.one("counter", "process_network_transmit_bytes_total", "Bytes sent over the network.", sent);
}
