//! A log that a real etcd wrote is read by ours.
//!
//! Starts the installed etcd on free loopback ports, puts keys with etcdctl, tries to open its log while it runs, kills
//! it, and looks for the puts in the log. Without an etcd the test says so and does nothing; in CI it fails.

use std::{
    net::TcpListener,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use actd::{
    pb::{
        etcdserverpb::{InternalRaftRequest, PutRequest, RequestHeader},
        raftpb,
    },
    wal::{Error, Options, Wal},
};
use prost::Message;

const ETCD: &str = "/usr/bin/etcd";
const ETCDCTL: &str = "/usr/bin/etcdctl";
const PUT_COUNT: usize = 5;

/// Ends the process also when the test fails.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// What it printed, if it succeeded.
fn etcdctl(endpoint: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(ETCDCTL)
        .env("ETCDCTL_API", "3")
        .args(["--endpoints", endpoint, "--dial-timeout", "1s", "--command-timeout", "2s"])
        .args(arguments)
        .output()
        .unwrap();
    output.status.success().then(|| String::from_utf8(output.stdout).unwrap())
}

fn start(data_dir: &Path) -> (Server, String) {
    let client = format!("http://127.0.0.1:{}", free_port());
    let peer = format!("http://127.0.0.1:{}", free_port());
    let child = Command::new(ETCD)
        .args(["--name", "m", "--data-dir"])
        .arg(data_dir)
        .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
        .args(["--initial-cluster", &format!("m={peer}")])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let server = Server(child);
    let deadline = Instant::now() + Duration::from_secs(30);
    while etcdctl(&client, &["put", "up", "1"]).is_none() {
        assert!(Instant::now() < deadline, "etcd does not answer");
    }
    (server, client)
}

#[test]
fn log_of_a_real_etcd_is_read() {
    if !Path::new(ETCD).exists() || !Path::new(ETCDCTL).exists() {
        assert!(std::env::var("CI").as_deref() != Ok("true"), "{ETCD} and {ETCDCTL} are not installed");
        println!("left out: {ETCD} and {ETCDCTL} are not installed");
        return;
    }
    let home = tempfile::tempdir().unwrap();
    let data_dir = home.path().join("data");
    let (server, endpoint) = start(&data_dir);
    for number in 0..PUT_COUNT {
        assert!(etcdctl(&endpoint, &["put", &format!("key{number}"), &format!("value{number}")]).is_some());
    }

    // D-28: its lock and ours are of one kind.
    let dir = data_dir.join("member/wal");
    assert!(matches!(Wal::open(Options::new(&dir)), Err(Error::Locked { .. })));
    drop(server);

    let (mut wal, recovered) = Wal::open(Options::new(&dir)).unwrap();
    let mut puts = Vec::new();
    for entry in &recovered.entries {
        // Conf changes are no requests, and 3.4 publishes its name as a v2 request, which has no put.
        let Ok(request) = InternalRaftRequest::decode(entry.data()) else { continue };
        let Some(put) = request.put else { continue };
        if put.key.starts_with(b"key") {
            puts.push((put.key.to_vec(), put.value.to_vec()));
        }
    }
    let expected: Vec<_> = (0..PUT_COUNT)
        .map(|number| (format!("key{number}").into_bytes(), format!("value{number}").into_bytes()))
        .collect();
    assert_eq!(puts, expected);
    assert!(recovered.metadata.node_id() != 0 && recovered.metadata.cluster_id() != 0);
    assert_eq!(recovered.snapshot.index(), 0);
    assert!(recovered.hard_state.term() >= 2 && recovered.hard_state.vote() == recovered.metadata.node_id());
    assert_eq!(recovered.repaired, None);

    // What we append is read by us behind what etcd wrote, and by etcd, which commits it.
    let last = recovered.entries.last().unwrap();
    let request = InternalRaftRequest {
        header: Some(RequestHeader { id: 1, ..Default::default() }),
        put: Some(PutRequest { key: "ours".into(), value: "appended".into(), ..Default::default() }),
        ..Default::default()
    };
    let next = raftpb::Entry {
        r#type: None,
        term: last.term,
        index: Some(last.index() + 1),
        data: Some(request.encode_to_vec().into()),
    };
    wal.append(std::slice::from_ref(&next), None, true).unwrap();
    wal.close().unwrap();
    let (again, entries) = Wal::open(Options::new(&dir)).map(|(wal, recovered)| (wal, recovered.entries)).unwrap();
    assert_eq!(entries[..entries.len() - 1], recovered.entries);
    assert_eq!(entries[entries.len() - 1], next);
    again.close().unwrap();
    let (_server, endpoint) = start(&data_dir);
    assert_eq!(etcdctl(&endpoint, &["get", "--print-value-only", "ours"]).as_deref(), Some("appended\n"));
}
