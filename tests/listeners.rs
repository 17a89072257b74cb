//! What each kind of listener serves: gRPC apart from HTTP, metrics on a port of their own, clients over a unix socket.

mod common;

use std::{
    fs::File,
    io::{self, Read, Write},
    net::TcpStream,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    pin::Pin,
    process::{Child, Command, Stdio},
    task::{Context, Poll},
    time::Instant,
};

use actd::pb::etcdserverpb::WatchCreateRequest;
use common::{
    Client,
    calls::{PATIENCE, Watching, block_on, put},
};
use hyper_util::rt::TokioIo;
use rustix::process::{Pid, Signal, kill_process};
use tonic::transport::{Channel, Endpoint, Uri};

/// A member with the client side as a test wants it; dropping it kills it.
struct Member {
    child: Child,
    folder: tempfile::TempDir,
}

impl Member {
    /// Starts one member; its folder is the working directory, to which the files of unix URLs are relative.
    fn start(client_url: &str, flags: &[String]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let mut member = Self { child: Self::spawn(folder.path(), client_url, flags), folder };
        let deadline = Instant::now() + PATIENCE;
        while !member.log().contains("ready to serve client requests") {
            let ended = member.child.try_wait().expect("our own child");
            assert!(ended.is_none() && Instant::now() < deadline, "{ended:?}\n{}", member.log());
            common::pause();
        }
        member
    }

    fn spawn(folder: &Path, client_url: &str, flags: &[String]) -> Child {
        let [peer] = common::free_ports();
        let peer = format!("http://127.0.0.1:{peer}");
        let log = File::options().create(true).append(true).open(folder.join("log")).expect("the log opens");
        Command::new(common::server_under_test(env!("CARGO_BIN_EXE_actd")))
            .current_dir(folder)
            .args(["--name=m0", "--data-dir=data"])
            .args([format!("--listen-client-urls={client_url}"), format!("--advertise-client-urls={client_url}")])
            .args([format!("--listen-peer-urls={peer}"), format!("--initial-advertise-peer-urls={peer}")])
            .arg(format!("--initial-cluster=m0={peer}"))
            .args(flags)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second handle"))
            .stderr(log)
            .spawn()
            .expect("the server starts")
    }

    fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.folder.path().join("log")).unwrap_or_default()).into_owned()
    }

    /// Starts it again after a kill.
    fn restart(&mut self, client_url: &str) {
        self.child.kill().expect("our own child");
        self.child.wait().expect("our own child");
        std::fs::remove_file(self.folder.path().join("log")).expect("the old log");
        self.child = Self::spawn(self.folder.path(), client_url, &[]);
        let deadline = Instant::now() + PATIENCE;
        while !self.log().contains("ready to serve client requests") {
            assert!(Instant::now() < deadline, "{}", self.log());
            common::pause();
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Status line and body of a plain GET; `None` where nothing of HTTP comes back.
fn ask(mut socket: impl Read + Write, path: &str) -> Option<(String, String)> {
    write!(socket, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").ok()?;
    let mut answer = Vec::new();
    let _ = socket.read_to_end(&mut answer);
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.lines().next()?.strip_prefix("HTTP/1.1 ")?;
    Some((status.to_owned(), body.to_owned()))
}

fn ask_port(port: u16, path: &str) -> Option<(String, String)> {
    let socket = TcpStream::connect(("127.0.0.1", port)).expect("the port is open");
    socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    ask(socket, path)
}

async fn channel(port: u16) -> Channel {
    let endpoint = Endpoint::from_shared(format!("http://127.0.0.1:{port}")).expect("an address");
    endpoint.connect().await.expect("a connection")
}

/// Connects to a file, whatever address is asked for.
struct OverSocket(PathBuf);

impl tower_service::Service<Uri> for OverSocket {
    type Response = TokioIo<tokio::net::UnixStream>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let path = self.0.clone();
        Box::pin(async move { Ok(TokioIo::new(tokio::net::UnixStream::connect(path).await?)) })
    }
}

const OK: &str = "200 OK";

#[test]
fn http_urls_take_http_away_from_the_client_urls() {
    let [grpc, http] = common::free_ports();
    let flags = [format!("--listen-client-http-urls=http://127.0.0.1:{http}")];
    let _member = Member::start(&format!("http://127.0.0.1:{grpc}"), &flags);
    block_on(async {
        let mut c = Client::over(channel(grpc).await);
        assert_eq!(c.set("k", "v").await, 2);
        let mut over_http = Client::over(channel(http).await);
        let refused = over_http.put(put("k", "v")).await.expect_err("no gRPC there");
        assert!(!refused.message().starts_with("etcdserver"), "{refused:?}");
        assert_eq!(c.revision().await, 2);
    });
    let (status, body) = ask_port(http, "/health").expect("HTTP");
    assert_eq!((status.as_str(), body.as_str()), (OK, r#"{"health":"true","reason":""}"#));
    for path in ["/version", "/metrics", "/livez", "/readyz"] {
        assert_eq!(ask_port(http, path).expect("HTTP").0, OK, "{path}");
    }
    for path in ["/health", "/version", "/metrics", "/"] {
        assert_eq!(ask_port(grpc, path), None, "{path} on the port for gRPC");
    }
}

#[test]
fn metrics_urls_serve_metrics_and_health_only() {
    let [client, metrics] = common::free_ports();
    let flags = [format!("--listen-metrics-urls=http://127.0.0.1:{metrics}")];
    let _member = Member::start(&format!("http://127.0.0.1:{client}"), &flags);
    block_on(async { Client::over(channel(client).await).set("k", "v").await });
    let (status, body) = ask_port(metrics, "/metrics").expect("HTTP");
    assert_eq!(status, OK);
    assert!(body.contains("\netcd_mvcc_put_total 1\n"));
    for path in ["/health", "/livez", "/livez/serializable_read", "/readyz", "/readyz/data_corruption"] {
        assert_eq!(ask_port(metrics, path).expect("HTTP").0, OK, "{path}");
        assert_eq!(ask_port(client, path).expect("HTTP").0, OK, "{path} is on the client port as well");
    }
    for path in ["/version", "/v3/kv/range", "/", "/debug/vars"] {
        let (status, body) = ask_port(metrics, path).expect("HTTP");
        assert_eq!((status.as_str(), body.as_str()), ("404 Not Found", "404 page not found\n"), "{path}");
    }
    assert_eq!(ask_port(client, "/version").expect("HTTP").0, OK);
    block_on(async {
        let refused = Client::over(channel(metrics).await).put(put("k", "v")).await;
        assert!(!refused.expect_err("no gRPC there").message().starts_with("etcdserver"));
    });
}

#[test]
fn clients_come_in_over_a_unix_socket() {
    // The file is host and path of the URL, and so relative.
    let url = "unix://client.sock:1";
    let mut member = Member::start(url, &[]);
    let path = member.folder.path().join("client.sock:1");
    assert!(!member.folder.path().join("data").join("client.sock:1").exists());
    let connect = || {
        let path = path.clone();
        async move {
            // The address is for the request's head only.
            let endpoint = Endpoint::from_static("http://socket");
            endpoint.connect_with_connector(OverSocket(path)).await.expect("a connection")
        }
    };
    block_on(async {
        let mut c = Client::over(connect().await);
        assert_eq!(c.set("k", "v").await, 2);
        assert_eq!(c.record("k").await.expect("it").value, "v");
        let create = WatchCreateRequest { key: "k".into(), start_revision: 2, ..Default::default() };
        assert_eq!(Watching::on(&c, create).await.events(1).await.len(), 1);
    });
    let socket = || UnixStream::connect(&path).expect("the socket is there");
    assert_eq!(ask(socket(), "/health").expect("HTTP").1, r#"{"health":"true","reason":""}"#);
    // A file that a killed process left is replaced.
    member.restart(url);
    block_on(async {
        assert_eq!(Client::over(connect().await).revision().await, 2);
    });
    kill_process(Pid::from_child(&member.child), Signal::TERM).expect("our own child");
    let deadline = Instant::now() + PATIENCE;
    while member.child.try_wait().expect("our own child").is_none() {
        assert!(Instant::now() < deadline, "it ends when told to");
        common::pause();
    }
}

#[test]
fn several_client_urls_are_all_served() {
    let [one, two] = common::free_ports();
    let urls = format!("http://127.0.0.1:{one},http://127.0.0.1:{two}");
    let _member = Member::start(&urls, &[]);
    block_on(async {
        let mut first = Client::over(channel(one).await);
        let mut second = Client::over(channel(two).await);
        assert_eq!(first.set("k", "v").await, 2);
        assert_eq!(second.record("k").await.expect("it").mod_revision, 2);
    });
    for port in [one, two] {
        assert_eq!(ask_port(port, "/health").expect("HTTP").0, OK);
    }
}
