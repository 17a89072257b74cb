//! Members as real processes, reachable by each other through the relay only.

use std::{
    fs::File,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use actd::{
    cluster::bootstrap::InitialCluster,
    pb::etcdserverpb::{
        HashKvRequest, MemberAddRequest, MemberPromoteRequest, MemberRemoveRequest, StatusRequest, StatusResponse,
    },
};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::sync::watch;
use tonic::transport::{Channel, Endpoint};

use crate::{
    common::{self, Client},
    relay::Network,
};

/// Whatever is waited for happens within this time, or the test fails.
pub const PATIENCE: Duration = Duration::from_secs(40);
const STEP: Duration = Duration::from_millis(20);

pub struct Member {
    pub name: String,
    pub id: u64,
    tell_id: watch::Sender<u64>,
    network: Network,
    folder: TempDir,
    pub client_port: u16,
    peer_port: u16,
    relay_port: u16,
    child: Option<Child>,
    initial_cluster: String,
    state: &'static str,
    program: PathBuf,
    flags: Vec<String>,
}

pub struct Cluster {
    pub members: Vec<Member>,
    pub network: Network,
    /// What new members are started with.
    pub flags: Vec<String>,
    pub program: PathBuf,
    named: usize,
}

impl Member {
    fn new(name: String, network: &Network, program: PathBuf, flags: Vec<String>) -> Self {
        let relay = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        relay.set_nonblocking(true).expect("a socket");
        let relay_port = relay.local_addr().expect("a bound socket").port();
        let [client_port, peer_port] = common::free_ports();
        let (tell_id, id) = watch::channel(0);
        network.relay(relay, id, peer_port);
        let folder = tempfile::Builder::new().prefix("member-").tempdir().expect("a temporary folder");
        Self {
            name,
            id: 0,
            tell_id,
            network: network.clone(),
            folder,
            client_port,
            peer_port,
            relay_port,
            child: None,
            initial_cluster: String::new(),
            state: "new",
            program,
            flags,
        }
    }

    pub fn peer_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.relay_port)
    }

    fn named_url(&self) -> String {
        format!("{}={}", self.name, self.peer_url())
    }

    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.client_port)
    }

    /// A connection that is made when it is used, and made again when it breaks.
    pub fn channel(&self) -> Channel {
        let endpoint = Endpoint::from_shared(self.endpoint()).expect("an address");
        endpoint.connect_timeout(Duration::from_secs(1)).connect_lazy()
    }

    pub fn client(&self) -> Client {
        Client::over(self.channel())
    }

    pub fn is_running(&self) -> bool {
        self.child.is_some()
    }

    pub fn start(&mut self) {
        assert!(self.child.is_none(), "{} runs", self.name);
        let log = File::options().create(true).append(true).open(self.log_path()).expect("the log file opens");
        let client = self.endpoint();
        let child = Command::new(&self.program)
            .env_remove("ETCD_BIN") // a server would take it for a flag of its own
            .args([
                format!("--name={}", self.name),
                format!("--data-dir={}", self.folder.path().join("data").display()),
                format!("--listen-client-urls={client}"),
                format!("--advertise-client-urls={client}"),
                format!("--listen-peer-urls=http://127.0.0.1:{}", self.peer_port),
                format!("--initial-advertise-peer-urls={}", self.peer_url()),
                format!("--initial-cluster={}", self.initial_cluster),
                format!("--initial-cluster-state={}", self.state),
            ])
            .args(&self.flags)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second handle"))
            .stderr(log)
            .spawn()
            .unwrap_or_else(|e| panic!("{} does not start: {e}", self.program.display()));
        self.network.runs_as(self.id, child.id());
        self.child = Some(child);
    }

    pub fn data_dir(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    /// Its disk is lost: it begins again as one that joins a running cluster, under its old URLs.
    pub fn wipe(&mut self) {
        assert!(self.child.is_none(), "{} runs", self.name);
        std::fs::remove_dir_all(self.data_dir()).expect("its data is there");
        self.state = "existing";
    }

    /// Starts with this flag, too, from now on.
    pub fn add_flag(&mut self, flag: &str) {
        self.flags.push(flag.to_owned());
    }

    /// Starts without this flag from now on.
    pub fn drop_flag(&mut self, flag: &str) {
        self.flags.retain(|given| given != flag);
    }

    /// What it has said so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// Whether its process has ended although nobody ended it.
    pub fn has_ended(&mut self) -> bool {
        self.child.as_mut().is_some_and(|child| child.try_wait().expect("our own child").is_some())
    }

    /// What its process has used so far; nothing where it does not run.
    pub fn cpu_time(&self) -> Duration {
        let Some(child) = &self.child else { return Duration::ZERO };
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id())).expect("our own child");
        // After the name in brackets: state, 10 numbers, then user and system time in ticks of 10 ms.
        let (_, fields) = stat.rsplit_once(')').expect("a name in brackets");
        let ticks = fields.split_ascii_whitespace().skip(11).take(2).map(|n| n.parse::<u64>().expect("a number"));
        Duration::from_millis(10 * ticks.sum::<u64>())
    }

    fn log_path(&self) -> PathBuf {
        self.folder.path().join("log")
    }

    fn signal(&self, signal: Signal) {
        let child = self.child.as_ref().expect("it runs");
        kill_process(Pid::from_child(child), signal).expect("our own child can be signalled");
    }

    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    /// Asks it to stop and waits.
    pub async fn terminate(&mut self) {
        self.signal(Signal::TERM);
        self.until_ended().await;
    }

    /// Waits until the process has ended by itself. Answers the exit code.
    pub async fn until_ended(&mut self) -> Option<i32> {
        let mut child = self.child.take().expect("it runs");
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = child.try_wait().expect("our own child") {
                return status.code();
            }
            if Instant::now() > deadline {
                let _ = child.kill();
                panic!("{} does not end", self.name);
            }
            tokio::time::sleep(STEP).await;
        }
    }

    pub async fn status(&self) -> Option<StatusResponse> {
        let mut client = self.client().maintenance;
        let asked = tokio::time::timeout(Duration::from_secs(1), client.status(StatusRequest {}));
        Some(asked.await.ok()?.ok()?.into_inner())
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            eprintln!("--- end of the log of {} ---", self.name);
            for line in &lines[lines.len().saturating_sub(25)..] {
                eprintln!("{}", line.chars().take(300).collect::<String>());
            }
        }
        self.kill();
    }
}

impl Cluster {
    /// A new cluster of `n` members that all answer.
    pub async fn start(n: usize, flags: &[&str]) -> Self {
        Self::start_of(common::server_under_test(env!("CARGO_BIN_EXE_actd")), n, flags).await
    }

    /// As `start`, of another program.
    pub async fn start_of(program: PathBuf, n: usize, flags: &[&str]) -> Self {
        Self::start_of_each(&vec![program; n], flags).await
    }

    /// A new cluster with one member of each program.
    pub async fn start_of_each(programs: &[PathBuf], flags: &[&str]) -> Self {
        let flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
        let program = PathBuf::new();
        let mut cluster = Self { members: Vec::new(), network: Network::default(), flags, program, named: 0 };
        for program in programs {
            cluster.program.clone_from(program);
            cluster.push();
        }
        let urls: Vec<String> = cluster.members.iter().map(Member::named_url).collect();
        // Known before they start, so that no connection belongs to nobody.
        let founding = InitialCluster::parse(&urls.join(","), |url| Ok(url.to_owned())).expect("a list of members");
        let founding = founding.found("etcd-cluster");
        for member in &mut cluster.members {
            member.id = founding.member_id(&member.name).expect("it is listed");
            member.tell_id.send_replace(member.id);
            member.initial_cluster = urls.join(",");
            member.start();
        }
        cluster.until_led().await;
        cluster
    }

    fn push(&mut self) -> usize {
        self.named += 1;
        let name = format!("m{}", self.named);
        self.members.push(Member::new(name, &self.network, self.program.clone(), self.flags.clone()));
        self.members.len() - 1
    }

    pub fn restart(&mut self, i: usize) {
        self.members[i].start();
    }

    /// The member all that answer take for the leader. Waits until there is one.
    pub async fn until_led(&self) -> usize {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(leader) = self.leader().await {
                return leader;
            }
            assert!(Instant::now() < deadline, "no leader within {PATIENCE:?}");
            tokio::time::sleep(STEP).await;
        }
    }

    /// The leader of the highest term that a majority knows.
    pub async fn leader(&self) -> Option<usize> {
        let mut votes: Vec<(u64, u64)> = Vec::new();
        for member in self.members.iter().filter(|m| m.is_running()) {
            if let Some(status) = member.status().await {
                votes.push((status.raft_term, status.leader));
            }
        }
        let newest = votes.iter().map(|(term, _)| *term).max()?;
        let known: Vec<u64> = votes.iter().filter(|v| v.0 == newest && v.1 != 0).map(|v| v.1).collect();
        if known.len() * 2 <= self.members.len() {
            return None;
        }
        self.members.iter().position(|member| member.id == known[0])
    }

    /// The leader and term that all who run tell alike. Waits until there is one.
    pub async fn until_agreed(&self) -> (usize, u64) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut told = Vec::new();
            for member in self.members.iter().filter(|m| m.is_running()) {
                told.push(member.status().await.map(|status| (status.leader, status.raft_term)));
            }
            if let Some((leader, term)) = told[0]
                && told.iter().all(|other| *other == told[0])
                && let Some(leader) = self.members.iter().position(|member| member.id == leader)
            {
                return (leader, term);
            }
            assert!(Instant::now() < deadline, "they do not agree on a leader: {told:?}");
            tokio::time::sleep(STEP).await;
        }
    }

    pub fn ids(&self) -> Vec<u64> {
        self.members.iter().map(|m| m.id).collect()
    }

    /// Adds a member that starts at once; `by`: who is asked.
    pub async fn add(&mut self, by: usize, is_learner: bool) -> usize {
        let new = self.push();
        let request = MemberAddRequest { peer_ur_ls: vec![self.members[new].peer_url()], is_learner };
        let deadline = Instant::now() + PATIENCE;
        let added = loop {
            match self.members[by].client().cluster.member_add(request.clone()).await {
                Ok(added) => break added.into_inner(),
                // Connections count only after some seconds.
                Err(e) if Instant::now() < deadline && e.message().contains("unhealthy") => {
                    tokio::time::sleep(STEP).await;
                }
                Err(e) => panic!("a member cannot be added: {e}"),
            }
        };
        let urls: Vec<String> = self.members.iter().map(Member::named_url).collect();
        let member = &mut self.members[new];
        member.id = added.member.expect("the member").id;
        member.tell_id.send_replace(member.id);
        member.initial_cluster = urls.join(",");
        member.state = "existing";
        member.start();
        new
    }

    /// Waits until it answers, too: before it has told its name it does not count as started (C-15).
    /// `token`: one that goes with the call, which etcd before 3.7 refuses where there is no auth.
    pub async fn promote(&self, by: usize, which: usize, token: Option<&str>) {
        let id = self.members[which].id;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut request = tonic::Request::new(MemberPromoteRequest { id });
            if let Some(token) = token {
                request.metadata_mut().insert("token", token.parse().expect("a token"));
            }
            match self.members[by].client().cluster.member_promote(request).await {
                Ok(_) => break,
                Err(e) if Instant::now() < deadline && e.message().contains("in sync") => {
                    tokio::time::sleep(STEP).await;
                }
                Err(e) => panic!("a learner cannot be promoted: {e}"),
            }
        }
        while self.members[which].status().await.is_none() {
            assert!(Instant::now() < deadline, "a promoted learner does not answer");
            tokio::time::sleep(STEP).await;
        }
    }

    /// Removes the member and gives back what is left of it; its process is expected to end by itself if it runs (C-17).
    pub async fn remove(&mut self, by: usize, which: usize) -> Member {
        let id = self.members[which].id;
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.members[by].client().cluster.member_remove(MemberRemoveRequest { id }).await {
                Ok(_) => break,
                Err(e) if Instant::now() < deadline && e.message().contains("unhealthy") => {
                    tokio::time::sleep(STEP).await;
                }
                Err(e) => panic!("a member cannot be removed: {e}"),
            }
        }
        let mut member = self.members.remove(which);
        if member.is_running() {
            assert_eq!(member.until_ended().await, Some(0), "{} ends of itself", member.name);
        }
        member
    }

    /// Waits until every member has applied the same and answers the same hash.
    pub async fn until_equal(&self) {
        let deadline = Instant::now() + PATIENCE;
        let mut last = Vec::new();
        loop {
            let mut hashes = Vec::new();
            for member in &self.members {
                let mut client = member.client().maintenance;
                let asked = tokio::time::timeout(Duration::from_secs(5), client.hash_kv(HashKvRequest { revision: 0 }));
                if let Ok(Ok(answer)) = asked.await {
                    let answer = answer.into_inner();
                    let revision = answer.header.map_or(0, |header| header.revision);
                    hashes.push((revision, answer.compact_revision, answer.hash));
                }
            }
            if hashes.len() == self.members.len() && hashes.windows(2).all(|pair| pair[0] == pair[1]) {
                return;
            }
            let same_revision = hashes.windows(2).all(|pair| pair[0].0 == pair[1].0 && pair[0].1 == pair[1].1);
            assert!(
                hashes.len() != self.members.len() || !same_revision,
                "different data at one revision (revision, compacted, hash): {hashes:?}"
            );
            assert!(Instant::now() < deadline, "the members do not come together: {hashes:?}, before {last:?}");
            last = hashes;
            tokio::time::sleep(STEP).await;
        }
    }

    /// Terms of all who answer, for "no election without a fault".
    pub async fn term(&self) -> u64 {
        let mut term = 0;
        for member in self.members.iter().filter(|m| m.is_running()) {
            term = term.max(member.status().await.map_or(0, |s| s.raft_term));
        }
        term
    }
}
