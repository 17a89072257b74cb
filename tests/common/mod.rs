//! What tests and benches of a running server share: the process, a typed client, optional tools.
//!
//! A server is `actd` or a real etcd: both take the same flags, so one helper starts either. It knows nothing of what
//! is tested. Not every user needs every helper, hence the `allow`.
#![allow(dead_code)]

pub mod calls;
pub mod raw;

use std::{
    env,
    ffi::OsString,
    fs::File,
    hash::{BuildHasher, RandomState},
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        LazyLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use actd::pb::etcdserverpb::{
    cluster_client::ClusterClient, kv_client::KvClient, lease_client::LeaseClient,
    maintenance_client::MaintenanceClient, watch_client::WatchClient,
};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tonic::transport::{Channel, Endpoint};

const READY_WITHIN: Duration = Duration::from_secs(30);
const STOPPED_WITHIN: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(10);
const STDERR_TAIL_LINES: usize = 60;

/// The server a test is about: `ACTD_UNDER_TEST`, for example a real etcd, or the `actd` cargo built.
pub fn server_under_test(built: &str) -> PathBuf {
    env::var_os("ACTD_UNDER_TEST").map_or_else(|| built.into(), PathBuf::from)
}

/// A program of the machine, by `<NAME>_BIN` or on `PATH`. Where it is missing a test is left out with one line, except
/// in CI (`CI=true`), where leaving out is failing.
pub fn require_tool(name: &str) -> Option<PathBuf> {
    let variable = format!("{}_BIN", name.to_uppercase());
    let found = match env::var_os(&variable) {
        Some(path) => Some(PathBuf::from(path)),
        None => env::split_paths(&env::var_os("PATH").unwrap_or_default())
            .map(|folder| folder.join(name))
            .find(|path| path.is_file()),
    };
    if found.is_none() {
        left_out(&format!("no `{name}` on PATH or in {variable}"));
    }
    found
}

/// Notes that a test is left out; in CI that is a failure.
pub fn left_out(why: &str) {
    assert!(env::var("CI").as_deref() != Ok("true"), "left out in CI: {why}");
    println!("left out: {why}");
}

/// A running server in a folder of its own on ports of its own; dropping it kills it.
pub struct Server {
    program: PathBuf,
    args: Vec<OsString>,
    folder: TempDir,
    child: Option<Child>,
    open_files: Option<u32>,
    pub client_port: u16,
    pub peer_port: u16,
}

impl Server {
    /// Starts `program` as a single member and waits until it is healthy.
    pub fn start(program: &Path, flags: &[&str]) -> Self {
        Self::start_in(&env::temp_dir(), program, flags)
    }

    /// As `start`, with the data in a new folder below `parent`.
    pub fn start_in(parent: &Path, program: &Path, flags: &[&str]) -> Self {
        let mut server = Self::stopped_in(parent, program, flags);
        server.restart();
        server
    }

    /// As `start`, with at most so many open files.
    pub fn start_with_open_files(program: &Path, open_files: u32, flags: &[&str]) -> Self {
        let mut server = Self::stopped_in(&env::temp_dir(), program, flags);
        server.open_files = Some(open_files);
        server.restart();
        server
    }

    /// As `start`, without starting: for a data directory that the test makes first.
    pub fn stopped_in(parent: &Path, program: &Path, flags: &[&str]) -> Self {
        let folder = tempfile::Builder::new().prefix("server-").tempdir_in(parent).expect("a temporary folder");
        let [client_port, peer_port] = free_ports();
        let client = format!("http://127.0.0.1:{client_port}");
        let peer = format!("http://127.0.0.1:{peer_port}");
        let mut args: Vec<OsString> = [
            "--name=m0",
            &format!("--listen-client-urls={client}"),
            &format!("--advertise-client-urls={client}"),
            &format!("--listen-peer-urls={peer}"),
            &format!("--initial-advertise-peer-urls={peer}"),
            &format!("--initial-cluster=m0={peer}"),
        ]
        .map(OsString::from)
        .into();
        let mut data_dir = OsString::from("--data-dir=");
        data_dir.push(folder.path().join("data"));
        args.push(data_dir);
        args.extend(flags.iter().map(OsString::from));

        Self { program: program.to_owned(), args, folder, child: None, open_files: None, client_port, peer_port }
    }

    /// Starts the process again on its old data and waits until it is healthy.
    pub fn restart(&mut self) {
        self.spawn();
        self.wait_for("/health", r#""health":"true""#);
    }

    /// As `restart`, for one that answers but is not healthy: it has alarms, or is a learner.
    pub fn restart_unhealthy(&mut self) {
        self.spawn();
        self.wait_for("/version", "etcdserver");
    }

    /// Starts the process as a new member `name` of a running cluster, and waits until it answers.
    pub fn join(&mut self, name: &str, cluster: &str) {
        // The last of equal flags wins.
        let flags = [
            format!("--name={name}"),
            format!("--initial-cluster={cluster}"),
            "--initial-cluster-state=existing".to_owned(),
        ];
        self.args.extend(flags.map(OsString::from));
        self.restart_unhealthy();
    }

    fn spawn(&mut self) {
        self.kill();
        let log = File::options().create(true).append(true).open(self.log_path()).expect("the log file opens");
        let mut command = match self.open_files {
            None => Command::new(&self.program),
            Some(limit) => {
                let mut shell = Command::new("sh");
                shell.arg("-c").arg(format!("ulimit -n {limit}; exec \"$0\" \"$@\"")).arg(&self.program);
                shell
            }
        };
        let child = command
            .args(&self.args)
            .env_remove("ETCD_BIN") // a server would take it for a flag of its own
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second handle of the log"))
            .stderr(log)
            .spawn()
            .unwrap_or_else(|error| panic!("{} does not start: {error}", self.program.display()));
        self.child = Some(child);
    }

    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.client_port)
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("the server runs").id()
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn data_dir(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    /// SIGKILL, and wait for the end.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// SIGTERM, and wait for the end.
    pub fn terminate(&mut self) -> ExitStatus {
        self.stop(Signal::TERM)
    }

    /// Sends `signal`, and waits for the end.
    pub fn stop(&mut self, signal: Signal) -> ExitStatus {
        let mut child = self.child.take().expect("the server runs");
        let pid = Pid::from_child(&child);
        kill_process(pid, signal).expect("our own child can be signalled");
        let deadline = Instant::now() + STOPPED_WITHIN;
        loop {
            if let Some(status) = child.try_wait().expect("our own child can be waited for") {
                return status;
            }
            if Instant::now() > deadline {
                let _ = child.kill();
                let _ = child.wait();
                panic!("{} ignored {signal:?} for {STOPPED_WITHIN:?}:\n{}", self.program.display(), self.stderr_tail());
            }
            pause();
        }
    }

    /// The end of what the server wrote, for a failing test.
    pub fn stderr_tail(&self) -> String {
        let log = std::fs::read(self.log_path()).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(STDERR_TAIL_LINES)..].join("\n")
    }

    /// One value of the server's own `/metrics`, by the exact text before it.
    pub fn metric(&self, name: &str) -> Option<f64> {
        let body = http_get(self.client_port, "/metrics")?;
        let line = body.lines().find(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(' ')))?;
        line[name.len()..].trim().parse().ok()
    }

    /// The server version that `/version` tells, for example `3.4.23`.
    pub fn version(&self) -> String {
        let body = http_get(self.client_port, "/version").expect("a version");
        let json: serde_json::Value = serde_json::from_str(&body).expect("JSON of /version");
        json["etcdserver"].as_str().expect("etcdserver in /version").to_owned()
    }

    fn log_path(&self) -> PathBuf {
        self.folder.path().join("stderr.log")
    }

    fn wait_for(&mut self, path: &str, text: &str) {
        let deadline = Instant::now() + READY_WITHIN;
        loop {
            if http_get(self.client_port, path).is_some_and(|body| body.contains(text)) {
                return;
            }
            let child = self.child.as_mut().expect("just started");
            let ended = child.try_wait().expect("our own child can be waited for");
            if ended.is_some() || Instant::now() > deadline {
                let tail = self.stderr_tail();
                panic!("{} is not ready ({ended:?}):\n{tail}", self.program.display());
            }
            pause();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if std::thread::panicking() && self.child.is_some() {
            eprintln!("--- end of the log of {} ---\n{}", self.program.display(), self.stderr_tail());
        }
        self.kill();
    }
}

/// Ports nobody listens on now and that this process gets once only; below those the system gives to whoever dials, so
/// that none is taken before it is used.
pub fn free_ports<const N: usize>() -> [u16; N] {
    static NEXT: LazyLock<AtomicU64> = LazyLock::new(|| AtomicU64::new(RandomState::new().hash_one(0) >> 1));
    std::array::from_fn(|_| {
        let mut ports = (0..1_000).map(|_| 10_000 + (NEXT.fetch_add(1, Ordering::Relaxed) % 22_000) as u16);
        ports.find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok()).expect("a free port on loopback")
    })
}

/// The body of a plain HTTP answer with status 200.
pub fn http_get(port: u16, path: &str) -> Option<String> {
    let mut socket = TcpStream::connect(("127.0.0.1", port)).ok()?;
    socket.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    write!(socket, "GET {path} HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n").ok()?;
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer).ok()?;
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer.split_once("\r\n\r\n")?;
    head.split(' ').nth(1).filter(|status| *status == "200")?;
    Some(body.to_owned())
}

/// The generated clients of one connection.
#[derive(Clone)]
pub struct Client {
    pub kv: KvClient<Channel>,
    pub watch: WatchClient<Channel>,
    pub lease: LeaseClient<Channel>,
    pub cluster: ClusterClient<Channel>,
    pub maintenance: MaintenanceClient<Channel>,
}

impl Client {
    pub async fn connect(server: &Server) -> Self {
        let channel = Endpoint::from_shared(server.endpoint())
            .expect("an http address")
            .connect()
            .await
            .unwrap_or_else(|error| panic!("no connection: {error:?}\n{}", server.stderr_tail()));
        Self::over(channel)
    }

    pub fn over(channel: Channel) -> Self {
        let all = usize::MAX; // answers are not limited by the server (G-11), so not by us
        Self {
            kv: KvClient::new(channel.clone()).max_decoding_message_size(all),
            watch: WatchClient::new(channel.clone()).max_decoding_message_size(all),
            lease: LeaseClient::new(channel.clone()).max_decoding_message_size(all),
            cluster: ClusterClient::new(channel.clone()).max_decoding_message_size(all),
            maintenance: MaintenanceClient::new(channel).max_decoding_message_size(all),
        }
    }
}

/// `mvccpb.Event`, decoded.
#[derive(Clone, PartialEq, prost::Message)]
pub struct EventRecord {
    #[prost(int32, tag = "1")]
    pub kind: i32,
    #[prost(message, optional, tag = "2")]
    pub kv: Option<actd::mvcc::record::KeyValue>,
    #[prost(message, optional, tag = "3")]
    pub prev_kv: Option<actd::mvcc::record::KeyValue>,
}

impl EventRecord {
    pub fn decode_raw(raw: &actd::mvcc::record::RawEvent) -> Self {
        prost::Message::decode(raw.0.clone()).expect("an event decodes")
    }

    pub fn is_delete(&self) -> bool {
        self.kind == 1
    }
}

/// Between two looks at a condition that another process makes true.
#[allow(clippy::disallowed_methods)]
pub fn pause() {
    std::thread::sleep(POLL);
}
