//! `actd` beside a real etcd: same machine, same disk, same client, in alternating rounds. See `benches/README.md`.
//!
//! What counts is the ratio of the two, most of all of CPU per operation: the load takes a large part of a small machine,
//! so rates under-state the difference. The client therefore does as little as it can: requests are encoded beforehand,
//! answers are not decoded, and each of its threads runs a runtime of its own.

#[path = "../tests/common/mod.rs"]
mod common;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use actd::pb::etcdserverpb::{PutRequest, RangeRequest};
use bytes::{Buf, BufMut, Bytes};
use common::Server;
use http::uri::PathAndQuery;
use prost::Message;
use tonic::{
    Request, Status,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    transport::{Channel, Endpoint},
};

const LOAD_THREADS: usize = 2;
const CONNECTIONS_MAX: usize = 10;
const FSYNCS: &str = "etcd_disk_wal_fsync_duration_seconds_count";
/// `utime` and `stime` of `/proc` are in units of 1/100 s on every architecture Linux runs on today.
const TICKS_PER_SECOND: u64 = 100;

struct Options {
    actd: PathBuf,
    etcd: PathBuf,
    data: PathBuf,
    round: Duration,
    rounds: usize,
    clients: Vec<usize>,
    keys: usize,
    value_bytes: usize,
}

fn main() {
    let Some(options) = Options::from_args() else { return };
    let names = ["actd", "etcd"];
    let servers = [&options.actd, &options.etcd].map(|program| Server::start_in(&options.data, program, &[]));
    for (name, server) in names.iter().zip(&servers) {
        println!("{name}: {} on {}", server.version(), server.endpoint());
    }
    println!(
        "{} hot keys, values of {} B, {} rounds of {:?} each, in turn",
        options.keys, options.value_bytes, options.rounds, options.round
    );
    println!(
        "{:<28} {:>6} {:>9} {:>8} {:>8} {:>9} {:>8} {:>9}",
        "", "", "op/s", "p50 µs", "p99 µs", "CPU µs/op", "fsync/op", "RSS MiB"
    );

    for operation in [Operation::Put, Operation::Get, Operation::SerializableGet] {
        let requests = operation.requests(&options);
        if matches!(operation, Operation::Get) {
            // Reads find every key on both servers, whatever the rounds of puts came to.
            let puts = Operation::Put.requests(&options);
            servers.iter().for_each(|server| fill(server, &puts));
        }
        for &clients in &options.clients {
            let mut cells = [Cell::default(), Cell::default()];
            for round in 0..options.rounds {
                // Who begins changes, so that neither always runs after the other's backlog.
                for which in [round % 2, 1 - round % 2] {
                    cells[which].add(measure(&servers[which], operation, clients, &requests, options.round));
                }
            }
            let name = format!("{}/clients={clients}", operation.name());
            for (cell, server) in cells.iter_mut().zip(names) {
                cell.samples.sort_unstable();
                cell.print(&name, server);
            }
            let [actd, etcd] = &cells;
            println!("{}", actd.ratios(etcd));
        }
    }
}

#[derive(Clone, Copy)]
enum Operation {
    Put,
    Get,
    SerializableGet,
}

impl Operation {
    fn name(self) -> &'static str {
        match self {
            Self::Put => "put",
            Self::Get => "get",
            Self::SerializableGet => "get_serializable",
        }
    }

    fn path(self) -> PathAndQuery {
        PathAndQuery::from_static(match self {
            Self::Put => "/etcdserverpb.KV/Put",
            Self::Get | Self::SerializableGet => "/etcdserverpb.KV/Range",
        })
    }

    /// One encoded request for each hot key.
    fn requests(self, options: &Options) -> Vec<Bytes> {
        let key = |i: usize| Bytes::from(format!("/bench/{i:08}"));
        let value = Bytes::from(vec![b'v'; options.value_bytes]);
        let encode = |i: usize| match self {
            Self::Put => PutRequest { key: key(i), value: value.clone(), ..Default::default() }.encode_to_vec(),
            Self::Get => RangeRequest { key: key(i), ..Default::default() }.encode_to_vec(),
            Self::SerializableGet => {
                RangeRequest { key: key(i), serializable: true, ..Default::default() }.encode_to_vec()
            }
        };
        (0..options.keys).map(|i| encode(i).into()).collect()
    }
}

/// The measurements of one operation on one server, over all rounds.
#[derive(Default)]
struct Cell {
    operations: u64,
    took: Duration,
    samples: Vec<u32>,
    cpu_ticks: u64,
    fsyncs: f64,
    rss_kib: u64,
}

impl Cell {
    fn add(&mut self, other: Cell) {
        self.operations += other.operations;
        self.took += other.took;
        self.samples.extend(other.samples);
        self.cpu_ticks += other.cpu_ticks;
        self.fsyncs += other.fsyncs;
        self.rss_kib = self.rss_kib.max(other.rss_kib);
    }

    fn rate(&self) -> f64 {
        self.operations as f64 / self.took.as_secs_f64()
    }

    fn percentile(&self, percent: usize) -> f64 {
        let last = self.samples.len().saturating_sub(1);
        self.samples.get(last * percent / 100).map_or(f64::NAN, |nanos| f64::from(*nanos) / 1_000.0)
    }

    fn cpu_micros(&self) -> f64 {
        (self.cpu_ticks * 1_000_000 / TICKS_PER_SECOND) as f64 / self.operations as f64
    }

    fn fsyncs_per_operation(&self) -> f64 {
        self.fsyncs / self.operations as f64
    }

    fn rss_mib(&self) -> f64 {
        self.rss_kib as f64 / 1024.0
    }

    fn numbers(&self) -> [f64; 6] {
        [
            self.rate(),
            self.percentile(50),
            self.percentile(99),
            self.cpu_micros(),
            self.fsyncs_per_operation(),
            self.rss_mib(),
        ]
    }

    fn print(&self, name: &str, server: &str) {
        let [rate, p50, p99, cpu, fsyncs, rss] = self.numbers();
        println!("{name:<28} {server:>6} {rate:>9.0} {p50:>8.0} {p99:>8.0} {cpu:>9.1} {fsyncs:>8.3} {rss:>9.0}");
    }

    fn ratios(&self, other: &Cell) -> String {
        let [ours, theirs] = [self.numbers(), other.numbers()];
        let ratio = |i: usize| match ours[i] / theirs[i] {
            ratio if ratio.is_finite() => format!("{ratio:.2}×"),
            _ => "-".to_owned(),
        };
        format!(
            "{:<28} {:>6} {:>9} {:>8} {:>8} {:>9} {:>8} {:>9}",
            "",
            "ratio",
            ratio(0),
            ratio(1),
            ratio(2),
            ratio(3),
            ratio(4),
            ratio(5)
        )
    }
}

/// One round on one server.
fn measure(server: &Server, operation: Operation, clients: usize, requests: &[Bytes], round: Duration) -> Cell {
    let fsyncs = || server.metric(FSYNCS).unwrap_or(f64::NAN);
    let (ticks_before, fsyncs_before) = (cpu_ticks(server.pid()), fsyncs());
    let connections = clients.min(CONNECTIONS_MAX);
    let begun = Instant::now();
    let samples = load(&server.endpoint(), operation, clients, connections, requests, begun + round);
    let took = begun.elapsed();
    Cell {
        operations: samples.len() as u64,
        took,
        samples,
        cpu_ticks: cpu_ticks(server.pid()) - ticks_before,
        fsyncs: fsyncs() - fsyncs_before,
        rss_kib: rss_kib(server.pid()),
    }
}

/// Runs `clients` in a closed loop until `end`. Answers the latencies in nanoseconds.
fn load(
    endpoint: &str,
    operation: Operation,
    clients: usize,
    connections: usize,
    requests: &[Bytes],
    end: Instant,
) -> Vec<u32> {
    let threads = LOAD_THREADS.min(connections);
    let requests: &Arc<[Bytes]> = &requests.into();
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|worker| {
                scope.spawn(move || {
                    // Connection `c` belongs to thread `c % threads`, client `n` to connection `n % connections`.
                    let own = |connection: usize| connection % threads == worker;
                    let runtime =
                        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
                    runtime.block_on(async {
                        let mut tasks = tokio::task::JoinSet::new();
                        for connection in (0..connections).filter(|connection| own(*connection)) {
                            let channel = connect(endpoint).await;
                            for client in (connection..clients).step_by(connections) {
                                let requests = Arc::clone(requests);
                                tasks.spawn(client_loop(channel.clone(), operation, client, requests, end));
                            }
                        }
                        tasks.join_all().await.concat()
                    })
                })
            })
            .collect();
        workers.into_iter().flat_map(|worker| worker.join().expect("the load does not panic")).collect()
    })
}

async fn connect(endpoint: &str) -> Channel {
    let endpoint = Endpoint::from_shared(endpoint.to_owned()).expect("an http address").tcp_nodelay(true);
    endpoint.connect().await.expect("the server takes connections")
}

async fn client_loop(
    channel: Channel,
    operation: Operation,
    client: usize,
    requests: Arc<[Bytes]>,
    end: Instant,
) -> Vec<u32> {
    let mut grpc = Grpc::new(channel);
    let path = operation.path();
    let mut samples = Vec::with_capacity(1 << 16);
    // A fixed walk of its own through the keys: 7,919 is prime to any round number of keys.
    let mut next = client * 7_919;
    loop {
        let begun = Instant::now();
        if begun >= end {
            return samples;
        }
        grpc.ready().await.expect("the connection lives");
        let request = Request::new(requests[next % requests.len()].clone());
        grpc.unary::<_, (), _>(request, path.clone(), Opaque).await.expect("the request succeeds");
        samples.push(u32::try_from(begun.elapsed().as_nanos()).unwrap_or(u32::MAX));
        next += 7_919;
    }
}

/// Puts every hot key once.
fn fill(server: &Server, puts: &[Bytes]) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let channel = connect(&server.endpoint()).await;
        let mut tasks = tokio::task::JoinSet::new();
        for lane in 0..100 {
            let (mut grpc, own) = (Grpc::new(channel.clone()), puts.iter().skip(lane).step_by(100).cloned());
            let own: Vec<Bytes> = own.collect();
            tasks.spawn(async move {
                for put in own {
                    grpc.ready().await.expect("the connection lives");
                    let path = Operation::Put.path();
                    grpc.unary::<_, (), _>(Request::new(put), path, Opaque).await.expect("the put succeeds");
                }
            });
        }
        tasks.join_all().await;
    });
}

/// Sends bytes as they are and drops answers unread.
#[derive(Clone, Copy)]
struct Opaque;

impl Codec for Opaque {
    type Encode = Bytes;
    type Decode = ();
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Opaque {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, buf: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buf.put(item);
        Ok(())
    }
}

impl Decoder for Opaque {
    type Item = ();
    type Error = Status;

    fn decode(&mut self, buf: &mut DecodeBuf<'_>) -> Result<Option<()>, Status> {
        buf.advance(buf.remaining());
        Ok(Some(()))
    }
}

/// User and system time of a process so far.
fn cpu_ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("the server runs");
    // The second field, the name, is in parentheses and may hold anything; utime and stime are the 14th and 15th.
    let (_, rest) = stat.rsplit_once(')').expect("a name in parentheses");
    let fields: Vec<&str> = rest.split_whitespace().collect();
    fields[11..13].iter().map(|ticks| ticks.parse::<u64>().expect("ticks are a number")).sum()
}

fn rss_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the server runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a process has VmRSS");
    line.trim().trim_end_matches(" kB").parse().expect("VmRSS is a number")
}

impl Options {
    /// From the command line; nothing where a tool is missing and that is allowed.
    fn from_args() -> Option<Self> {
        let args: Vec<String> = std::env::args().skip(1).collect();
        let value = |name: &str| {
            let position = args.iter().position(|arg| arg == name)?;
            Some(args.get(position + 1).unwrap_or_else(|| panic!("{name} needs a value")).clone())
        };
        let number = |name: &str, default: usize| {
            value(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name} {text}: not a number")))
        };
        // `cargo bench` passes `--bench`; `cargo test --benches` does not and wants only to know that it works.
        let tiny = args.iter().any(|arg| arg == "--test") || !args.iter().any(|arg| arg == "--bench");
        let etcd = match value("--etcd") {
            Some(path) => PathBuf::from(path),
            None => common::require_tool("etcd")?,
        };
        let seconds: f64 =
            value("--seconds").map_or(if tiny { 0.2 } else { 3.0 }, |text| text.parse().expect("seconds"));
        let clients = value("--clients").unwrap_or_else(|| "1,100".to_owned());
        Some(Self {
            actd: value("--actd").map_or_else(|| common::server_under_test(env!("CARGO_BIN_EXE_actd")), PathBuf::from),
            etcd,
            data: value("--data").map_or_else(std::env::temp_dir, |path| Path::new(&path).to_owned()),
            round: Duration::from_secs_f64(seconds),
            rounds: number("--rounds", if tiny { 1 } else { 3 }),
            clients: clients.split(',').map(|text| text.parse().expect("--clients 1,100")).collect(),
            keys: number("--keys", if tiny { 100 } else { 10_000 }),
            value_bytes: number("--value-bytes", 256),
        })
    }
}
