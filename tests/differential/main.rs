//! The same random requests to a real etcd and to the server under test, every answer compared field by field.
//!
//! One seeded sequence goes to both in lock-step. Key-value, lease, watch, hash and alarm calls come with few keys and
//! hostile arguments; ids that a server chooses are mapped, clocks have a tolerance, and what may differ otherwise is
//! listed in `known.rs` with its reason. At the end the run prints how often each call, field and error occurred, and
//! fails where something occurred too seldom to mean anything.
//!
//! Environment: `ETCD_BIN` the reference (default `etcd` on `PATH`), `ACTD_UNDER_TEST` another server than our own,
//! `DIFF_REQUESTS` how many (100,000 in CI, else 5,000), `DIFF_SEED` the first session's seed.

mod answer;
#[path = "../common/mod.rs"]
mod common;
mod generate;
mod histogram;
mod known;
mod watching;

use std::{
    collections::HashMap,
    env,
    path::Path,
    time::{Duration, Instant},
};

use actd::pb::etcdserverpb::{
    LeaseGrantRequest, LeaseKeepAliveRequest, LeaseKeepAliveResponse, LeaseLeasesRequest, PutRequest, RangeResponse,
    RequestOp, StatusRequest, TxnRequest, compare::TargetUnion, request_op,
};
use answer::{Answer, Failure, Identity, Reply};
use common::{Client, Server};
use generate::{Generator, MAX_REQUEST_BYTES, OWN_MEMBER, Request, Step};
use histogram::Histogram;
use known::{KNOWN, NEVER_ASKED, NEVER_WITH_OLD, NOT_ASKED_OF_OLD, When};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Status, Streaming};
use watching::{Created, Observer, WatchPair};

const FULL_SIZE: u64 = 100_000;
const QUICK_SIZE: u64 = 5_000;
/// How often each class must occur in a run of full size.
const OCCURRENCES: u64 = 100;
const REQUESTS_PER_SESSION: u64 = 12_500;
const WATCH_STREAMS: usize = 2;
/// Watchers of a stream before it is replaced, so that a sync stays cheap.
const WATCHERS_MAX: usize = 24;
const ANSWER_WITHIN: Duration = Duration::from_secs(15);
const DIFFERENCES_SHOWN: usize = 12;

#[test]
fn random_requests_get_the_answers_of_etcd() {
    let Some(reference) = common::require_tool("etcd") else { return };
    let subject = common::server_under_test(env!("CARGO_BIN_EXE_actd"));
    let number = |name: &str, default: u64| {
        env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name} is not a number")))
    };
    let in_ci = env::var("CI").as_deref() == Ok("true");
    let total = number("DIFF_REQUESTS", if in_ci { FULL_SIZE } else { QUICK_SIZE });
    let first_seed = number("DIFF_SEED", 1);

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let mut histogram = Histogram::default();
    let mut old_reference = false;
    let mut left = total;
    let mut seed = first_seed;
    let begun = Instant::now();
    while left > 0 {
        let requests = left.min(REQUESTS_PER_SESSION);
        old_reference = runtime.block_on(session(&reference, &subject, seed, requests, &mut histogram));
        left -= requests;
        seed += 1;
    }
    println!("{}", histogram.render());
    NEVER_ASKED.iter().for_each(|never| println!("never asked, {}: {}", never.statement, never.reason));
    if old_reference {
        NOT_ASKED_OF_OLD.iter().for_each(|(statement, reason)| println!("not asked, {statement}: {reason}"));
    }
    println!("{total} requests, seeds {first_seed}..{seed}, {:.1} s", begun.elapsed().as_secs_f64());
    let missing = if old_reference { NEVER_WITH_OLD } else { &[] };
    histogram.check(if total >= FULL_SIZE { OCCURRENCES } else { 1 }, missing);
}

/// One server with what is needed to speak to it in the reference's terms.
struct Side {
    server: Server,
    client: Client,
    /// Lease ids: the reference's → this server's.
    leases: HashMap<i64, i64>,
    keep_alive: Option<(UnboundedSender<LeaseKeepAliveRequest>, Streaming<LeaseKeepAliveResponse>)>,
    member: u64,
}

/// Runs one session on fresh servers. Answers whether the reference was an etcd 3.4 and the subject was not.
async fn session(reference: &Path, subject: &Path, seed: u64, requests: u64, histogram: &mut Histogram) -> bool {
    println!("session with seed {seed}: {requests} requests");
    let limit = format!("--max-request-bytes={MAX_REQUEST_BYTES}");
    // Longer elections make the shortest lease 5 s (L-4): none ends on its own between two requests.
    let flags = ["--unsafe-no-fsync", &limit, "--heartbeat-interval=300", "--election-timeout=3000"];
    let mut sides = [Side::start(reference, &flags).await, Side::start(subject, &flags).await];
    let [old, new] = sides.each_ref().map(|side| side.server.version());
    let old_reference = old.starts_with("3.4.") && !new.starts_with("3.4.");
    let mut run = Run {
        identities: [sides[0].identity().await, sides[1].identity().await],
        generator: Generator::new(seed, WATCH_STREAMS, seed.is_multiple_of(2), old_reference),
        old_reference,
        differences: Vec::new(),
    };

    let clients = sides.each_ref().map(|side| side.client.clone());
    let clients = [&clients[0], &clients[1]];
    let mut observer = Observer::open(clients, &run.identities).await;
    let mut streams = Vec::new();
    for _ in 0..WATCH_STREAMS {
        streams.push(WatchPair::open(clients));
    }
    let mut watchers = [0; WATCH_STREAMS];
    let mut done = 0;
    while done < requests {
        let step = run.generator.step();
        match step {
            Step::Call(request) => {
                run.call(&mut sides, request, histogram).await;
                done += 1;
            }
            Step::WatchCreate(stream, request) => {
                histogram.watch_create(&request);
                watchers[stream] += 1;
                let shown = format!("{request:?}");
                match streams[stream].create(&run.identities, request, run.generator.compacted).await {
                    Ok(Created::Accepted) => histogram.count("watch/created"),
                    Ok(Created::Compacted) => histogram.count("watch/created on compacted history"),
                    Ok(Created::Refused(reason)) => histogram.count(&format!("watch refused/{reason}")),
                    Err((a, b)) => {
                        run.differences.push(format!("{shown}\n  reference {a:?}\n  subject   {b:?}"));
                        run.stop_on_differences(seed, done); // the streams are of no use after that
                    }
                }
                done += 1;
            }
            Step::WatchCancel(stream, id) => {
                let known = streams[stream].cancel(&run.identities, id).await;
                histogram.count(if known { "watch/cancel" } else { "watch/cancel of an unknown id" });
                done += 1;
            }
            Step::WatchNothing(stream) => {
                streams[stream].send_nothing();
                histogram.count("watch/empty request");
                done += 1;
            }
            Step::Sync { progress } => {
                run.sync(&mut observer, &mut streams, histogram).await;
                for stream in &mut streams {
                    if progress && stream.answers_progress(run.generator.revision) {
                        stream.progress(&run.identities, run.generator.revision).await;
                        histogram.count("watch/progress answered");
                        done += 1;
                    } else if progress {
                        stream.ask_progress();
                        histogram.count("watch/progress asked while it may be dropped");
                        done += 1;
                    }
                }
                observer.forget_below(run.generator.compacted);
            }
            Step::Settle => {
                run.sync(&mut observer, &mut streams, histogram).await;
                for stream in &mut streams {
                    stream.settle(&run.identities).await;
                }
            }
            Step::WatchReopen(stream) => watchers[stream] = WATCHERS_MAX,
        }
        if let Some(stream) = watchers.iter().position(|count| *count >= WATCHERS_MAX) {
            run.sync(&mut observer, &mut streams, histogram).await;
            let [a, b] = streams[stream].fragments();
            histogram.add("watch/fragments of the reference", a);
            histogram.add("watch/fragments of the subject", b);
            streams[stream] = WatchPair::open(clients);
            watchers[stream] = 0;
        }
        run.stop_on_many_differences(seed, done);
    }
    run.sync(&mut observer, &mut streams, histogram).await;
    run.stop_on_differences(seed, done);
    old_reference
}

struct Run {
    identities: [Identity; 2],
    generator: Generator,
    old_reference: bool,
    differences: Vec<String>,
}

impl Run {
    async fn call(&mut self, sides: &mut [Side; 2], request: Request, histogram: &mut Histogram) {
        let translated = sides[1].translate(&request);
        let [a, b] = &mut *sides;
        let first = a.own_member(&request);
        let both = async { tokio::join!(a.call(first), b.call(translated)) };
        let Ok((mut reference, mut subject)) = tokio::time::timeout(ANSWER_WITHIN, both).await else {
            panic!("no answer within {ANSWER_WITHIN:?} to {}", shorten(&format!("{request:?}")));
        };
        self.map_granted_lease(&mut sides[1], &request, &reference, &subject);
        self.identities[0].normalise(&request, &mut reference);
        self.identities[1].normalise(&request, &mut subject);
        answer::reconcile(self.generator.server_leases, &mut reference, &mut subject);

        histogram.reply(&request, &reference, self.generator.revision);
        self.generator.learn(&request, &reference);
        for known in KNOWN.iter().filter(|known| known.when == When::Always || self.old_reference) {
            if reference == subject {
                break;
            }
            let before = (reference.clone(), subject.clone());
            (known.align)(&request, &mut reference, &mut subject);
            if before != (reference.clone(), subject.clone()) {
                histogram.count(&format!("known difference/{}: {}", known.statement, known.reason));
            }
        }
        if reference != subject {
            let difference = format!("{request:?}\n  reference {reference:?}\n  subject   {subject:?}");
            // At once as well: what follows from it may end the run before its end.
            eprintln!("difference: {}", shorten(&difference));
            self.differences.push(difference);
        }
    }

    fn map_granted_lease(&mut self, side: &mut Side, request: &Request, reference: &Reply, subject: &Reply) {
        if let (
            Request::LeaseGrant(LeaseGrantRequest { id: 0, .. }),
            Ok(Answer::LeaseGrant(ours)),
            Ok(Answer::LeaseGrant(theirs)),
        ) = (request, reference, subject)
        {
            assert!(ours.id > 0 && theirs.id > 0, "L-1: a chosen lease id is positive");
            side.leases.insert(ours.id, theirs.id);
            self.identities[1].leases.insert(theirs.id, ours.id);
        }
    }

    async fn sync(&mut self, observer: &mut Observer, streams: &mut [WatchPair], histogram: &mut Histogram) {
        let revision = self.generator.revision;
        let mut events = observer.sync(&self.identities, revision).await;
        for stream in streams {
            events += stream.sync(&self.identities, &observer.history, revision).await;
        }
        histogram.count("watch/sync");
        histogram.add("watch/events compared", events);
    }

    fn stop_on_many_differences(&self, seed: u64, done: u64) {
        if self.differences.len() >= DIFFERENCES_SHOWN {
            self.stop_on_differences(seed, done);
        }
    }

    fn stop_on_differences(&self, seed: u64, done: u64) {
        let shown: Vec<String> = self.differences.iter().map(|text| shorten(text)).collect();
        assert!(shown.is_empty(), "differences by request {done} of seed {seed}:\n{}", shown.join("\n"));
    }
}

/// Large values are not worth reading.
fn shorten(text: &str) -> String {
    const LINE_MAX: usize = 1_500;
    text.lines().map(|line| format!("{}\n", line.chars().take(LINE_MAX).collect::<String>())).collect()
}

impl Side {
    async fn start(program: &Path, flags: &[&str]) -> Self {
        let server = Server::start(program, flags);
        let client = Client::connect(&server).await;
        Self { server, client, leases: HashMap::new(), keep_alive: None, member: 0 }
    }

    async fn identity(&mut self) -> Identity {
        let status = self.client.maintenance.status(StatusRequest {}).await.expect("a status").into_inner();
        let header = status.header.expect("a header (G-5)");
        assert!(header.member_id != 0 && header.cluster_id != 0 && header.raft_term != 0, "G-5: {header:?}");
        self.member = header.member_id;
        Identity { member: header.member_id, cluster: header.cluster_id, leases: HashMap::new() }
    }

    async fn call(&mut self, request: Request) -> Reply {
        let Client { kv, lease, maintenance, .. } = &mut self.client;
        let reply = match request {
            Request::Range(r) => kv.range(r).await.map(|a| Answer::Range(a.into_inner())),
            Request::RangeStream(r) => match kv.range_stream(r).await {
                Ok(stream) => merge(stream.into_inner()).await,
                Err(status) => Err(status),
            },
            Request::Put(r) => kv.put(r).await.map(|a| Answer::Put(a.into_inner())),
            Request::DeleteRange(r) => kv.delete_range(r).await.map(|a| Answer::DeleteRange(a.into_inner())),
            Request::Txn(r) => kv.txn(r).await.map(|a| Answer::Txn(a.into_inner())),
            Request::Compact(r) => kv.compact(r).await.map(|a| Answer::Compact(a.into_inner())),
            Request::LeaseGrant(r) => lease.lease_grant(r).await.map(|a| Answer::LeaseGrant(a.into_inner())),
            Request::LeaseRevoke(r) => lease.lease_revoke(r).await.map(|a| Answer::LeaseRevoke(a.into_inner())),
            Request::LeaseKeepAlive(id) => self.keep_alive(id).await,
            Request::LeaseTimeToLive(r) => {
                lease.lease_time_to_live(r).await.map(|a| Answer::LeaseTimeToLive(a.into_inner()))
            }
            Request::LeaseLeases => {
                lease.lease_leases(LeaseLeasesRequest {}).await.map(|a| Answer::LeaseLeases(a.into_inner()))
            }
            Request::HashKv(r) => maintenance.hash_kv(r).await.map(|a| Answer::HashKv(a.into_inner())),
            Request::Alarm(r) => maintenance.alarm(r).await.map(|a| Answer::Alarm(a.into_inner())),
        };
        reply.map_err(|status| Failure { code: status.code(), message: status.message().to_owned() })
    }

    /// One stream for the whole session, opened by the first request on it.
    async fn keep_alive(&mut self, id: i64) -> Result<Answer, Status> {
        let request = LeaseKeepAliveRequest { id };
        let gone = || Status::unavailable("the keepalive stream ended");
        if self.keep_alive.is_none() {
            let (requests, outgoing) = unbounded_channel();
            let outgoing = UnboundedReceiverStream::new(outgoing);
            // A server need not answer at all before the first request.
            requests.send(request).map_err(|_| gone())?;
            let stream = self.client.lease.lease_keep_alive(outgoing).await?.into_inner();
            self.keep_alive = Some((requests, stream));
        } else if let Some((requests, _)) = &self.keep_alive {
            requests.send(request).map_err(|_| gone())?;
        }
        let (_, responses) = self.keep_alive.as_mut().expect("open");
        let answer = responses.message().await.and_then(|answer| answer.ok_or_else(gone));
        if answer.is_err() {
            self.keep_alive = None;
        }
        answer.map(Answer::LeaseKeepAlive)
    }

    fn own_member(&self, request: &Request) -> Request {
        let mut request = request.clone();
        if let Request::Alarm(alarm) = &mut request
            && alarm.member_id == OWN_MEMBER
        {
            alarm.member_id = self.member;
        }
        request
    }

    /// The request with this server's own ids in it.
    fn translate(&self, request: &Request) -> Request {
        let mut request = self.own_member(request);
        let lease = |id: &mut i64| *id = *self.leases.get(id).unwrap_or(id);
        match &mut request {
            Request::Put(r) => lease(&mut r.lease),
            Request::Txn(r) => translate_txn(r, &lease),
            Request::LeaseGrant(r) => lease(&mut r.id),
            Request::LeaseRevoke(r) => lease(&mut r.id),
            Request::LeaseKeepAlive(id) => lease(id),
            Request::LeaseTimeToLive(r) => lease(&mut r.id),
            _ => {}
        }
        request
    }
}

fn translate_txn(txn: &mut TxnRequest, lease: &impl Fn(&mut i64)) {
    for compare in &mut txn.compare {
        if let Some(TargetUnion::Lease(id)) = &mut compare.target_union {
            lease(id);
        }
    }
    for RequestOp { request } in txn.success.iter_mut().chain(&mut txn.failure) {
        match request {
            Some(request_op::Request::RequestPut(PutRequest { lease: id, .. })) => lease(id),
            Some(request_op::Request::RequestTxn(inner)) => translate_txn(inner, lease),
            _ => {}
        }
    }
}

/// A streamed range in the form of the unary one (KV-29).
async fn merge(mut stream: Streaming<actd::pb::etcdserverpb::RangeStreamResponse>) -> Result<Answer, Status> {
    let mut whole = RangeResponse::default();
    while let Some(part) = stream.message().await? {
        let part = part.range_response.unwrap_or_default();
        whole.kvs.extend(part.kvs);
        (whole.header, whole.more, whole.count) = (part.header, part.more, part.count);
    }
    Ok(Answer::Range(whole))
}
