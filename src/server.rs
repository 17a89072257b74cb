//! One member: opens its data, starts its actors in the order of the data flow, serves, and stops in phases.

mod compactor;
mod corruption;
mod data;
mod descriptors;
mod discovery;
mod dns;
mod join;
mod lessor;
mod peers;
mod srv;
mod versions;

pub use data::{Unfit, fit};
use descriptors::Descriptors;

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
    mpsc::sync_channel,
};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, anyhow, bail};

use crate::{
    actor::{Gate, Inbox, Registry, placement::Arbiters, shell, watchdog},
    api,
    apply::{self, ApplyActor, Replies, ViewCell},
    cluster::{Refusal, bootstrap},
    config::{Config, GoDuration, Url},
    http::{
        front::Front,
        listener::{self, Listener},
        runtime::{self, Limits, Runtimes, Serves},
    },
    lease::{self, Expirer},
    peer::{
        self, Listening, Transport,
        endpoints::{Endpoints, Promote, PromoteError},
    },
    raft::{self, RaftActor},
    snapshot::{self, Checkpointer},
    storage::{Storage, fjall},
    telemetry::Metrics,
    wal::{self, writer::WalActor},
    watch,
};

/// Proposals waiting or under way. 5,000 may be committed ahead of apply (G-12); as many again fill the next batches,
/// and the lane must never be smaller than the gate.
const PROPOSALS_MAX: usize = 10_000;
/// Their encoded bytes: some forty of the largest requests, or all slots with 6 KiB each.
const PROPOSAL_BYTES_MAX: usize = 64 << 20;
/// Appends waiting for the WAL. raft takes no new Ready beyond it, so a few are enough to keep the disk busy.
const APPENDS_MAX: usize = 64;
const APPEND_BYTES_MAX: usize = 64 << 20;
/// Batches of committed entries waiting for apply, and their bytes.
const COMMITTED_MAX: usize = 1024;
const COMMITTED_BYTES_MAX: usize = 64 << 20;
/// Keepalives waiting for the lease expirer; one that finds it full tries again.
const LEASE_ASKS_MAX: usize = 10_000;
/// Bytes of log entries kept in memory for followers that lag.
const CATCH_UP_BYTES_MAX: usize = 64 << 20;
/// Reads that wait for a round; each is small.
const READS_MAX: usize = 20_000;
/// Long answers: pieces in memory, of 1 MiB each, and answers made whole. A larger one of these goes alone.
const ANSWER_PIECES_MAX: usize = 64 << 20;
const ANSWERS_WHOLE_MAX: usize = 64 << 20;
/// Messages of other members that wait for raft. What has no room is dropped: raft sends again.
const PEER_MESSAGES_MAX: usize = 8_192;
const PEER_MESSAGE_BYTES_MAX: usize = 64 << 20;
/// Commit may be this far ahead of apply before proposals are refused (G-12).
const APPLY_LAG_MAX: u64 = 5_000;
/// The same for revocations of leases where these go first.
const REVOKE_LAG_MAX: u64 = 10_000;

/// Unix milliseconds: the seed of ids that must differ after a restart.
#[allow(clippy::disallowed_methods)] // the one look at the wall clock here
fn unix_ms() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

/// RPC runtimes: one per core.
fn rpc_runtimes() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Why a member that was removed ends, and does not start again (C-17). No failure of this process.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the member has been permanently removed from the cluster")]
pub struct Removed;

/// A running member.
pub struct Member {
    server: Arc<api::Server>,
    runtimes: Arc<Runtimes>,
    arbiters: Arbiters,
    wal: crate::actor::Sender<raft::Append, wal::Control>,
    listeners: Vec<tokio::task::JoinHandle<()>>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
    transport: Arc<Transport>,
    peer_port: Option<Listening>,
}

/// Opens the data directory and starts everything. Returns once clients are served.
pub async fn start(config: &Config) -> anyhow::Result<Member> {
    let began = Instant::now();
    let descriptors = Descriptors::of_this_process(rpc_runtimes())?;
    let store_options = fjall::Options { open_tables: descriptors.tables, ..fjall::Options::default() };
    // Before anything is written: a port that is taken must not leave data behind that a corrected start goes on from.
    let peer_port = peer::Bound::bind(&config.listen_peer_urls, config.socket_reuse_port).await?;
    let client_ports = listen(config).await?;
    let opened = data::open(config, &store_options).await?;
    let ids = opened.ids;
    let restarted = opened.core.applied_index() > 0;
    let storage = opened.storage;
    let request_timeout = Duration::from_secs(5) + 2 * Duration::from_millis(config.election_timeout_ms);
    let min_lease_ttl = lease::min_ttl(config.election_ticks(), config.heartbeat_interval_ms);

    let core = opened.core;
    let view = ViewCell::new(core.view());
    let applied = Arc::new(AtomicU64::new(core.applied_index()));
    let registry = Registry::default();
    let metrics = Metrics::new(config.metrics == "extensive");
    let raft_status = Arc::new(raft::Status::new(Duration::from_millis(config.heartbeat_interval_ms)));

    let rpc = rpc_runtimes();
    // One delivery queue more than RPC runtimes: for the server's own proposals.
    let own_runtime = rpc;
    let (replies, mut deliveries) = Replies::new(rpc + 1);
    let own_deliveries = deliveries.pop().context("a delivery queue for the server")?;
    let hub_config = watch::HubConfig {
        cluster_id: ids.cluster,
        member_id: ids.member,
        fragment_bytes: config.max_request_bytes as usize + (512 << 10),
        progress_interval_ms: config.watch_progress_interval().as_millis() as u64,
        ..watch::HubConfig::default()
    };
    let mut ports = Vec::new();
    let mut parts = Vec::new();
    for deliveries in deliveries {
        let (port, client, ends) = watch::connect(hub_config.stream_budget_bytes, watch::PUBLISHED_MAX);
        ports.push(port);
        parts.push(runtime::Parts { deliveries, watch: client, hub: ends, hub_config: hub_config.clone() });
    }

    // Every message holds a permit of a gate, and the lane has room for all of them.
    let slots = PROPOSALS_MAX + READS_MAX + PEER_MESSAGES_MAX;
    let (raft_tx, raft_rx) = Inbox::new("raft", slots, PROPOSAL_BYTES_MAX + 2 * PEER_MESSAGE_BYTES_MAX);
    let (wal_tx, wal_rx) = Inbox::new("wal", APPENDS_MAX, APPEND_BYTES_MAX);
    let (apply_tx, apply_rx) = Inbox::new("apply", COMMITTED_MAX, COMMITTED_BYTES_MAX);
    let (lease_tx, lease_rx) = Inbox::new("lease_expirer", LEASE_ASKS_MAX, usize::MAX);
    let (checkpoint_tx, checkpoint_rx) = Inbox::new("checkpointer", 1, usize::MAX);
    let gate = Gate::new("proposals", PROPOSALS_MAX, PROPOSAL_BYTES_MAX);
    for stats in [&raft_tx.stats, &wal_tx.stats, &apply_tx.stats, &lease_tx.stats, &checkpoint_tx.stats] {
        registry.add(stats);
    }
    let reads = Gate::new("reads", READS_MAX, READS_MAX);
    let peer_messages = Gate::new("peer_messages", PEER_MESSAGES_MAX, PEER_MESSAGE_BYTES_MAX);
    // Bounded by their bytes alone.
    let answer_pieces = Gate::new("answer_pieces", ANSWER_PIECES_MAX, ANSWER_PIECES_MAX);
    let answers_whole = Gate::new("answers_whole", ANSWERS_WHOLE_MAX, ANSWERS_WHOLE_MAX);
    for gate in [&gate, &reads, &peer_messages, &answer_pieces, &answers_whole] {
        registry.add_gate(gate);
    }

    let server = Arc::new(api::Server::new(api::Parts {
        settings: api::Settings {
            cluster_id: ids.cluster,
            member_id: ids.member,
            max_request_bytes: config.max_request_bytes as usize,
            max_txn_ops: config.max_txn_ops as usize,
            quota_bytes: config.quota(),
            quota_configured: config.quota_backend_bytes,
            request_timeout,
            min_lease_ttl,
            strict_reconfig_check: config.strict_reconfig_check,
            election_timeout: Duration::from_millis(config.election_timeout_ms),
            slow_request: config.slow_unary_request(),
            profiles: config.enable_pprof || config.log_level == "debug",
            fast_lease_keep_alive: config.feature_gates.enabled("FastLeaseKeepAlive"),
            features: config.feature_gates.states().map(|(gate, open)| (gate.name, gate.stage.name(), open)).collect(),
        },
        view: view.clone(),
        storage: storage.clone(),
        raft: raft_tx.clone(),
        raft_status: raft_status.clone(),
        apply: apply_tx.clone(),
        leases: lease_tx.clone(),
        gate,
        reads,
        answer_pieces,
        answers_whole,
        registry: registry.clone(),
        metrics: metrics.clone(),
        started_unix_ms: unix_ms(),
    }));

    let mut arbiters = Arbiters::default();
    let main = tokio::runtime::Handle::current();
    let mut tasks = vec![tokio::spawn(own_deliveries.deliver()), tokio::spawn(watchdog::watch(registry.clone()))];

    // peers
    let (peer_arbiter, _) = arbiters.place("peer");
    let stores = Arc::new(opened.stores);
    let transport = Transport::start(peer::Wiring {
        cluster_id: ids.cluster,
        member_id: ids.member,
        own_peer_urls: config.initial_advertise_peer_urls.clone(),
        local_address: config.local_address(),
        election_timeout: Duration::from_millis(config.election_timeout_ms),
        incoming: Arc::new(peers::ToRaft::new(server.clone(), peer_messages)),
        databases: Arc::new(peers::Stores {
            server: server.clone(),
            in_use: storage.clone(),
            dir: stores.clone(),
            incoming: config.member_path().join("incoming.db"),
            receiving: Arc::default(),
            runtime: main.clone(),
        }),
        arbiter: peer_arbiter.clone(),
        registry,
    });
    server.set_links(transport.clone());
    let endpoints = Endpoints { server: server.clone(), runtime: own_runtime, promote: promote(&server, own_runtime) };
    let answer: peer::Handler = Arc::new(move |request| {
        let endpoints = endpoints.clone();
        Box::pin(async move { endpoints.answer(request).await })
    });
    let peer_port = peer_port.serve(&peer_arbiter, &transport, &answer, descriptors.peers);
    for url in &config.listen_peer_urls {
        tracing::info!(address = %url, "serving peers");
    }
    transport.set_members(core.members().iter());
    for remote in &opened.remotes {
        transport.add_remote(remote.id, &remote.peer_urls);
    }

    // raft
    let raft_core = raft::Core::new(
        raft::Options {
            id: ids.member,
            election_ticks: config.election_ticks() as usize,
            heartbeat_ticks: 1,
            pre_vote: config.pre_vote,
            apply_lag_max: APPLY_LAG_MAX,
            revoke_lag_max: match config.feature_gates.enabled("PriorityRequest") {
                true => REVOKE_LAG_MAX,
                false => APPLY_LAG_MAX,
            },
            catch_up_entries: config.snapshot_catchup_entries,
            catch_up_bytes: CATCH_UP_BYTES_MAX,
            seed: ids.member.rotate_left(48) ^ (unix_ms() << 8),
        },
        opened.recovered,
    )
    .map_err(|e| anyhow!(e))?;
    let wiring = raft::Wiring {
        wal: wal_tx.clone(),
        apply: apply_tx.clone(),
        send: Box::new({
            let transport = transport.clone();
            move |messages| transport.send(messages)
        }),
        replies: replies.clone(),
        status: raft_status.clone(),
        applied: applied.clone(),
    };
    let (arbiter, vital) = arbiters.place("raft");
    shell::spawn(&arbiter, raft_rx, vital, move || RaftActor::new(raft_core, wiring));

    // wal
    let (arbiter, vital) = arbiters.place("wal");
    let (log, raft_again, keep) = (opened.wal, raft_tx.clone(), config.max_wals as usize);
    let sync_metrics = metrics.clone();
    let on_write: wal::writer::OnWrite = Arc::new(move |appended| {
        sync_metrics.wal_bytes.fetch_add(appended.bytes, Ordering::Relaxed);
        if let Some(spent) = appended.write {
            sync_metrics.wal_write.record(spent);
        }
        if let Some(spent) = appended.sync {
            sync_metrics.wal_sync.record(spent);
        }
    });
    let writer = wal::Writer::new(log, keep, on_write);
    shell::spawn(&arbiter, wal_rx, vital, move || WalActor::new(writer, raft_again));

    // apply
    let notices = lease_tx.clone();
    let (alarm_server, alarm_runtime) = (server.clone(), main.clone());
    let wiring = apply::Wiring {
        raft: raft_tx.clone(),
        replies,
        view: view.clone(),
        applied: applied.clone(),
        hubs: ports,
        lease_notices: Box::new(move |n| {
            notices.control(lease::actor::Control::Notices(n));
        }),
        ask_alarm: Box::new(move || {
            let _inside = alarm_runtime.enter();
            alarm_server.ask_alarm(own_runtime);
        }),
        metrics: metrics.clone(),
        install: Box::new({
            let (in_use, settings) = (storage.clone(), opened.settings);
            move |install| peers::install(install, &in_use, &stores, &store_options, &settings)
        }),
        hash: corruption::hasher(apply_tx.clone()),
        slow_apply: config.warning_apply_duration.to_std(),
        clean_up: apply::CleanUp {
            keys: config.compaction_batch(),
            pause: config.compaction_pause(),
            wake_after: Box::new({
                let (apply, runtime) = (apply_tx.clone(), main.clone());
                move |pause| {
                    let apply = apply.clone();
                    runtime.spawn(async move {
                        // A millisecond more, so that the pause is over whatever the timer's grain.
                        tokio::time::sleep(pause + Duration::from_millis(1)).await;
                        apply.wake();
                    });
                }
            }),
        },
        on_members: Box::new({
            let (transport, server, own) = (transport.clone(), server.clone(), ids.member);
            move |members| {
                transport.set_members(members.iter());
                if members.is_removed(own) {
                    server.removed.notify_one();
                }
            }
        }),
    };
    let (arbiter, vital) = arbiters.place("apply");
    shell::spawn(&arbiter, apply_rx, vital, move || ApplyActor::new(core, wiring));

    // checkpointer
    let (arbiter, vital) = arbiters.place("checkpointer");
    let checkpointer = Checkpointer::new(snapshot::Wiring {
        storage: storage.clone(),
        raft: raft_tx.clone(),
        applied: applied.clone(),
        entries_between: config.snapshot_count,
        metrics: metrics.clone(),
    });
    shell::spawn(&arbiter, checkpoint_rx, vital, move || checkpointer);
    tasks.push(tokio::spawn(async move {
        let mut every = ticks(snapshot::SYNC_INTERVAL);
        loop {
            every.tick().await;
            // At most one is waiting: a slow disk is not asked twice.
            let _ = checkpoint_tx.try_send(snapshot::Tick);
        }
    }));

    // lease expirer
    let (arbiter, vital) = arbiters.place("lease_expirer");
    let expirer = Expirer::new(
        config.election_timeout_ms,
        request_timeout.as_millis() as u64,
        config.feature_gates.enabled("LeaseCheckpoint").then_some(lease::CHECKPOINT_INTERVAL_MS),
    );
    let proposer = lessor::Proposer::new(server.clone(), own_runtime, main.clone());
    let next_deadline = Arc::new(AtomicU64::new(u64::MAX));
    let (for_actor, newest) = (next_deadline.clone(), view.clone());
    shell::spawn(&arbiter, lease_rx, vital, move || {
        let leases = Box::new(move || newest.load().leases.clone());
        lease::actor::LeaseActor::new(expirer, proposer, leases, for_actor, Instant::now())
    });
    tasks.push(tokio::spawn(lessor::follow_leadership(server.clone())));
    tasks.push(tokio::spawn(lessor::tick(server.clone(), next_deadline)));

    // compactor
    if let Some(schedule) = compactor::schedule(config).map_err(|e| anyhow!(e))? {
        let (sender, inbox) = Inbox::new("compactor", 1, usize::MAX);
        server.registry.add(&sender.stats);
        let every = schedule.tick_interval();
        let (arbiter, vital) = arbiters.place("compactor");
        let (of, runtime) = (server.clone(), main.clone());
        shell::spawn(&arbiter, inbox, vital, move || compactor::Compactor::new(schedule, of, own_runtime, runtime));
        tasks.push(tokio::spawn(async move {
            let mut every = ticks(every);
            every.tick().await;
            loop {
                every.tick().await;
                let _ = sender.try_send(compactor::Tick);
            }
        }));
    }

    // the raft clock
    let heartbeat = Duration::from_millis(config.heartbeat_interval_ms);
    let ticking = raft_tx.clone();
    let clock = raft_status.clone();
    tasks.push(tokio::spawn(async move {
        let mut every = ticks(heartbeat);
        loop {
            every.tick().await;
            // A tick that raft has not looked at yet is not followed by another: missed ticks are not replayed.
            if !clock.tick_pending.swap(true, Ordering::AcqRel) {
                ticking.control(raft::Control::Tick);
            }
        }
    }));
    // The first look, so that a lone member leads at once.
    raft_tx.control(raft::Control::Tick);
    tasks.push(tokio::spawn(watch_leader(server.clone())));
    if config.initial_election_tick_advance {
        tasks.push(tokio::spawn(advance_ticks(server.clone(), config.election_ticks() as usize)));
    }

    let limits = Limits {
        max_concurrent_streams: config.max_concurrent_streams,
        pings: config.server_pings(),
        least_ping_gap: config.least_ping_gap(),
    };
    let front = Front::new(&config.cors, &config.host_whitelist);
    let runtimes = Arc::new(Runtimes::start(&server, parts, &limits, front));
    let (for_clients, for_metrics) = descriptors.for_clients_and_metrics(!config.listen_metrics_urls.is_empty());
    let (metrics_ports, client_ports) = client_ports.into_iter().partition(|(_, serves, _)| *serves == Serves::Metrics);
    // A member that cannot join its cluster is looked at, too.
    let mut listeners = serve(metrics_ports, &runtimes, for_metrics);

    tokio::select! {
        done = publish(&server, config, own_runtime) => done?,
        // A member that was removed while it was down: nobody lets it take part, so it would wait for ever.
        () = server.removed.notified() => bail!(Removed),
    }
    tasks.push(tokio::spawn(versions::watch(server.clone(), own_runtime)));
    if config.downgrade_check_time > GoDuration::ZERO {
        let every = config.downgrade_check_time.to_std();
        tasks.push(tokio::spawn(versions::watch_downgrade(server.clone(), every, own_runtime)));
    }
    if restarted && config.feature_gates.enabled("InitialCorruptCheck") {
        corruption::check_at_start(&server).await?;
    }
    if config.corrupt_check_time > GoDuration::ZERO {
        let every = config.corrupt_check_time.to_std();
        tasks.push(tokio::spawn(corruption::watch(server.clone(), every, own_runtime)));
    }

    if config.feature_gates.enabled("CompactHashCheck") {
        let every = config.compact_hash_check_time.to_std();
        tasks.push(tokio::spawn(corruption::watch_compactions(server.clone(), every, own_runtime)));
    }

    tracing::info!(
        member_id = format!("{:x}", ids.member),
        cluster_id = format!("{:x}", ids.cluster),
        took = ?began.elapsed(),
        "ready to serve client requests"
    );
    // Clients come in only now (G-14).
    listeners.extend(serve(client_ports, &runtimes, for_clients));
    Ok(Member { server, runtimes, arbiters, wal: wal_tx, listeners, tasks, transport, peer_port: Some(peer_port) })
}

/// Election timeouts without a leader after which streams that ask for one end (W-48).
const LEADERLESS_MAX: u32 = 3;

/// Tells streams that ask for a leader when there has been none at several looks in a row.
async fn watch_leader(server: Arc<api::Server>) {
    let mut every = ticks(server.settings.election_timeout);
    every.tick().await;
    let mut without = 0;
    loop {
        every.tick().await;
        without = if server.raft_status.read().leader == 0 { without + 1 } else { 0 };
        if without >= LEADERLESS_MAX {
            server.no_leader.notify_waiters();
        }
    }
}

/// A member among others need not wait a whole election timeout for its first election, once it can hear two of them.
async fn advance_ticks(server: Arc<api::Server>, election_ticks: usize) {
    let mut every = ticks(Duration::from_millis(50));
    for _ in 0..100 {
        every.tick().await;
        let view = server.view.load_full();
        let active = view.members.iter().filter(|member| server.connected_since(member.id).is_some()).count();
        if active >= 2 && server.raft_status.read().leader == 0 {
            server.raft.control(raft::Control::AdvanceTicks(election_ticks.saturating_sub(2)));
            return;
        }
    }
}

/// Promotions that other members forward.
fn promote(server: &Arc<api::Server>, runtime: usize) -> Promote {
    let server = server.clone();
    Arc::new(move |id| {
        let server = server.clone();
        Box::pin(async move {
            // Here or, as etcd does, at who leads now: leadership may have changed since it was asked.
            match server.promote_anywhere(id, None, runtime).await {
                Ok(members) => Ok(members),
                Err(apply::Error::Member(Refusal::NotFound | Refusal::Removed)) => Err(PromoteError::NotFound),
                Err(apply::Error::Member(Refusal::NotLearner)) => Err(PromoteError::NotLearner),
                Err(apply::Error::LearnerNotReady) => Err(PromoteError::NotReady),
                Err(e) => Err(PromoteError::Other(format!("etcdserver: {e}"))),
            }
        })
    })
}

fn ticks(period: Duration) -> tokio::time::Interval {
    let mut every = tokio::time::interval(period);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    every
}

/// Tells the cluster this member's name and client URLs, then the cluster version: the first entries of every start.
async fn publish(server: &Arc<api::Server>, config: &Config, runtime: usize) -> anyhow::Result<()> {
    let member = server.settings.member_id;
    let urls: Vec<String> = config.advertise_client_urls.iter().map(ToString::to_string).collect();
    let attempt = || async {
        // Who is led knows what was committed before, and by that the other members.
        let led = server.raft_status.until(|now| now.leader != 0).await;
        server.view.until(|view| view.applied_index >= led.commit && view.members.get(member).is_some()).await;
        let oldest = versions::oldest(server).await;
        let request = bootstrap::publish_request(member, &config.name, &urls);
        server.propose_for(request, oldest, None, runtime).await
    };
    loop {
        // Saying it twice does no harm, and one that was forwarded while connections are made may be lost.
        match tokio::time::timeout(PUBLISH_RETRY, attempt()).await {
            Ok(Ok(_)) => break,
            Ok(Err(apply::Error::Stopped)) => return Err(anyhow!("stopped before the member could join its cluster")),
            Ok(Err(e)) => tracing::warn!("cannot publish this member yet: {e}; trying again"),
            Err(_) => tracing::info!("this member is not published yet; trying again"),
        }
    }
    if let Some(term) = server.raft_status.leads_alone() {
        // Before clients come in, as nobody else has to be asked.
        if let Err(e) = versions::look(server, term, runtime).await {
            tracing::warn!("the cluster version could not be set yet: {e}; trying again");
        }
    }
    Ok(())
}

/// An address for clients, and what is served there.
type ClientPort<'a> = (Listener, Serves, &'a Url);

async fn listen(config: &Config) -> anyhow::Result<Vec<ClientPort<'_>>> {
    let on_client_port = if config.listen_client_http_urls.is_empty() { Serves::GrpcAndHttp } else { Serves::Grpc };
    let groups = [
        (&config.listen_client_urls, on_client_port),
        (&config.listen_client_http_urls, Serves::Http),
        (&config.listen_metrics_urls, Serves::Metrics),
    ];
    let mut ports = Vec::new();
    for (urls, serves) in groups {
        for url in urls {
            let listeners = listener::listen(url, config.socket_reuse_port).await?;
            ports.extend(listeners.into_iter().map(|listener| (listener, serves, url)));
        }
    }
    Ok(ports)
}

/// Serves `ports`, with so many `connections` on all of them together.
fn serve(ports: Vec<ClientPort<'_>>, runtimes: &Arc<Runtimes>, connections: usize) -> Vec<tokio::task::JoinHandle<()>> {
    let places = Arc::new(tokio::sync::Semaphore::new(connections));
    let serve = |(listener, serves, url): ClientPort<'_>| {
        tracing::info!(address = %url, "serving client traffic");
        tokio::spawn(listener::accept(listener, runtimes.clone(), serves, places.clone()))
    };
    ports.into_iter().map(serve).collect()
}

/// How long a member waits for what it told its cluster before it tells it again.
const PUBLISH_RETRY: Duration = Duration::from_secs(2);

/// How long each phase of the stop may take.
const STOP_WAIT: Duration = Duration::from_secs(5);

impl Member {
    /// Until this member has been removed from its cluster.
    pub async fn removed(&self) {
        self.server.removed.notified().await;
    }

    /// A leader makes the voter it has been connected with the longest lead, so that writes go on at once (C-44).
    async fn hand_over(&self) {
        let status = &self.server.raft_status;
        let now = status.read();
        if !now.is_leader || now.is_alone {
            return;
        }
        let view = self.server.view.load_full();
        let others = view.members.iter().filter(|member| !member.is_learner);
        let connected = others.filter_map(|member| Some((self.server.connected_since(member.id)?, member.id)));
        let Some((_, to)) = connected.min() else { return };
        tracing::info!(to = format!("{to:x}"), "handing leadership over");
        self.server.raft.control(raft::Control::Transfer { to });
        let handed = status.until(|now| !now.is_leader && now.leader != 0);
        if tokio::time::timeout(self.server.settings.request_timeout, handed).await.is_err() {
            tracing::warn!("leadership could not be handed over in time");
        }
    }

    /// Stops in phases: no new connections, waiting proposals refused, the log and the store synced.
    pub async fn stop(mut self) {
        for listener in &self.listeners {
            listener.abort();
        }
        tracing::info!(connections = self.runtimes.connections(), "stopping");
        self.hand_over().await;
        let (raft, wal, apply) = (self.server.raft.clone(), self.wal, self.server.apply.clone());
        let storage = self.server.storage.clone();
        let (arbiters, transport, peer_port) = (self.arbiters, self.transport, self.peer_port.take());
        let finish = tokio::task::spawn_blocking(move || {
            // In the order of the data flow: raft takes the end of its log writer or applier for a failure.
            let (done, stopped) = sync_channel(1);
            raft.control(raft::Control::Stop(done));
            let _ = stopped.recv_timeout(STOP_WAIT);
            let (done, stopped) = sync_channel(1);
            wal.control(wal::Control::Stop(done));
            let _ = stopped.recv_timeout(STOP_WAIT);
            let (done, stopped) = sync_channel(1);
            apply.control(apply::Control::Stop(done));
            let _ = stopped.recv_timeout(STOP_WAIT);
            if let Err(e) = storage.sync() {
                tracing::warn!("the store could not be synced at the end: {e}; the log has everything");
            }
            transport.stop();
            drop(peer_port);
            arbiters.stop();
        });
        let _ = tokio::time::timeout(3 * STOP_WAIT, finish).await;
        for task in &self.tasks {
            task.abort();
        }
        tracing::info!("stopped");
    }
}
