//! Other people's clients against a running server: the real etcdctl, npm's `etcd3`, the Rust crate `etcd-client`.
//!
//! Their scripts are in `tests/clients/`. A client that is not on the machine is left out with one line, in CI it must be
//! there. `ACTD_UNDER_TEST=/usr/bin/etcd` runs all of them against a real etcd: what the scripts expect is what it does.
//! `UPDATE_EXPECTED=1` writes what etcdctl printed back into its script, to be read in review.

mod common;

use std::{
    env, fs,
    io::{BufRead, BufReader, Read, Write},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use common::Server;

const COMMAND_WITHIN: Duration = Duration::from_secs(30);
/// Of a client that is fetched and built first.
const BUILD_WITHIN: Duration = Duration::from_secs(900);
/// Whatever follows these says how many elections there were.
const TERM_NAMES: [&str; 2] = ["\"raft_term\":", "\"RaftTerm\" : "];
/// What `etcdctl.txt` was recorded with; other releases print some things differently.
const ETCDCTL_RELEASE: &str = "etcdctl version: 3.4.";

fn server() -> Server {
    Server::start(&common::server_under_test(env!("CARGO_BIN_EXE_actd")), &[])
}

fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients")
}

/// Where clients are fetched and built: kept between runs, outside the sources.
fn workshop(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::create_dir_all(&folder).expect("a folder below target/");
    folder
}

#[test]
fn etcdctl_prints_what_it_prints_with_etcd() {
    let Some(etcdctl) = common::require_tool("etcdctl") else { return };
    let version = run(Command::new(&etcdctl).arg("version").env("ETCDCTL_API", "3"), "", COMMAND_WITHIN);
    if !String::from_utf8_lossy(&version.stdout).starts_with(ETCDCTL_RELEASE) {
        return common::left_out("etcdctl is of another release than its recorded output");
    }
    let server = server();
    let path = scripts().join("etcdctl.txt");
    let script = fs::read_to_string(&path).expect("the script");
    let mut session = EtcdctlSession { etcdctl, server: &server, lease: String::new() };
    let mut actual = String::new();
    for line in script.lines().filter(|line| line.starts_with('$')) {
        actual.push_str(line);
        actual.push('\n');
        for output in session.execute(line).lines() {
            actual.push_str(&format!("  {output}").trim_end().replace("  \n", "\n"));
            actual.push('\n');
        }
    }
    if env::var_os("UPDATE_EXPECTED").is_some() {
        return fs::write(&path, &actual).expect("the script can be written");
    }
    let first = script.lines().zip(actual.lines()).position(|(expected, actual)| expected != actual);
    if let Some(line) = first {
        panic!("line {} of etcdctl.txt differs; all of it:\n{actual}", line + 1);
    }
    assert_eq!(script, actual);
}

#[test]
fn etcdctl_check_perf_passes_small_load() {
    // It runs for a minute, whatever the server.
    if env::var("CI").as_deref() != Ok("true") && env::var_os("CLIENTS_SLOW").is_none() {
        return println!("left out: etcdctl check perf takes a minute; CI or CLIENTS_SLOW=1 runs it");
    }
    let Some(etcdctl) = common::require_tool("etcdctl") else { return };
    let server = server();
    let mut command = Command::new(etcdctl);
    command.args(["--endpoints", &server.endpoint(), "check", "perf", "--load=s"]).env("ETCDCTL_API", "3");
    let output = run(&mut command, "", Duration::from_secs(120));
    let text = String::from_utf8_lossy(&output.stdout);
    // Its verdict on throughput is the machine's matter; that no request failed is the server's.
    assert!(text.contains("Throughput is"), "{text}");
    assert!(!text.contains("too many errors"), "{text}");
}

/// One command line of `etcdctl.txt` after the other.
///
/// `$ words` is run with its output taken whole; `$9 words` never ends by itself and is stopped after nine lines; `$~
/// words` has all numbers taken out, as they differ from run to run. Text after ` <<` goes to standard input, `|` is a
/// line end. `LEASE` is the lease that was granted last.
struct EtcdctlSession<'a> {
    etcdctl: PathBuf,
    server: &'a Server,
    lease: String,
}

impl EtcdctlSession<'_> {
    fn execute(&mut self, line: &str) -> String {
        let (mode, words) = line[1..].split_once(' ').expect("a space after `$`");
        let (words, input) = words.split_once(" <<").unwrap_or((words, ""));
        let args: Vec<String> =
            words.split(' ').map(|word| word.trim_matches('"').replace("LEASE", &self.lease)).collect();
        let mut command = Command::new(&self.etcdctl);
        command.args(["--endpoints", &format!("127.0.0.1:{}", self.server.client_port)]).args(&args);
        command.env("ETCDCTL_API", "3");

        let text = match mode.parse::<usize>() {
            Ok(lines) => first_lines(&mut command, lines),
            Err(_) => {
                let output = run(&mut command, &input.replace('|', "\n"), COMMAND_WITHIN);
                shown(&output)
            }
        };
        if let Some(rest) = text.strip_prefix("lease ").filter(|_| words.starts_with("lease grant")) {
            self.lease = rest.split(' ').next().expect("split gives one").to_owned();
        }
        let text = if self.lease.is_empty() { text } else { text.replace(&self.lease, "LEASE") };
        self.scrub(&text, mode == "~")
    }

    /// Takes out what a run cannot repeat: ports, ids, terms, durations, and all numbers where asked.
    fn scrub(&self, text: &str, numbers: bool) -> String {
        let port = self.server.client_port.to_string();
        let mut out = String::new();
        let mut run = String::new();
        for c in text.chars().chain(['\0']) {
            if c.is_alphanumeric() || c == '.' {
                run.push(c);
                continue;
            }
            let starts_with_digit = run.starts_with(|c: char| c.is_ascii_digit());
            let mut digits = run.chars().filter(|c| c.is_ascii_digit()).count();
            if run.chars().any(|c| c.is_alphabetic()) && !run.chars().all(|c| c.is_ascii_hexdigit()) {
                digits = 0;
            }
            if run == "127.0.0.1" {
                out.push_str(&run);
            } else if run == port {
                out.push_str("PORT");
            } else if starts_with_digit && run.ends_with('s') && run.contains('.') {
                out.push_str("DURATION");
            } else if run.len() >= 12 && digits >= 6 {
                out.push_str("ID");
            } else if starts_with_digit && (numbers || out.ends_with(TERM_NAMES[0]) || out.ends_with(TERM_NAMES[1])) {
                out.push('N');
            } else {
                out.push_str(&run);
            }
            run.clear();
            out.push(c);
        }
        out.trim_end_matches('\0').to_owned()
    }
}

/// Standard output, the error's own line, and the exit code unless 0. What else a client logs is its own matter.
fn shown(output: &Output) -> String {
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    for line in errors.lines().filter(|line| !line.starts_with('{')) {
        text.push_str(line);
        text.push('\n');
    }
    if let Some(code) = output.status.code().filter(|code| *code != 0) {
        text.push_str(&format!("exit {code}\n"));
    }
    text
}

/// Lets a program end by itself, with a deadline.
fn run(command: &mut Command, input: &str, within: Duration) -> Output {
    let shown = format!("{command:?}");
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{shown}: {error}"));
    // A program that does not read its input may be gone already.
    let _ = child.stdin.take().expect("piped").write_all(input.as_bytes());
    let (out, err) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
    let [out, err] = [read_all(out), read_all(err)];
    let deadline = Instant::now() + within;
    let status = loop {
        if let Some(status) = child.try_wait().expect("our own child can be waited for") {
            break status;
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            panic!("{shown} did not end within {within:?}");
        }
        common::pause();
    };
    Output { status, stdout: out.join().expect("a reader"), stderr: err.join().expect("a reader") }
}

fn read_all(mut pipe: impl Read + Send + 'static) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        pipe.read_to_end(&mut bytes).expect("a pipe can be read");
        bytes
    })
}

/// The first lines of a program that goes on for ever.
fn first_lines(command: &mut Command, count: usize) -> String {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("the program starts");
    let out = BufReader::new(child.stdout.take().expect("piped"));
    let (lines, received) = mpsc::channel();
    thread::spawn(move || out.lines().map_while(Result::ok).take(count).try_for_each(|line| lines.send(line)));
    let mut text = String::new();
    for _ in 0..count {
        match received.recv_timeout(COMMAND_WITHIN) {
            Ok(line) => text.push_str(&format!("{line}\n")),
            Err(_) => {
                text.push_str("(no more lines)\n");
                break;
            }
        }
    }
    let _ = child.kill();
    let _ = child.wait();
    text
}

#[test]
fn node_client_etcd3_works() {
    let (Some(node), Some(npm)) = (common::require_tool("node"), common::require_tool("npm")) else { return };
    let folder = workshop("clients-node");
    for file in ["package.json", "package-lock.json", "script.mjs"] {
        fs::copy(scripts().join("node").join(file), folder.join(file)).expect("a copy");
    }
    let lock = fs::read(folder.join("package-lock.json")).expect("the lock file");
    if fs::read(folder.join("installed.json")).ok().as_ref() != Some(&lock) {
        let output = run(Command::new(npm).args(["ci", "--ignore-scripts"]).current_dir(&folder), "", BUILD_WITHIN);
        assert!(output.status.success(), "npm ci: {}", shown(&output));
        fs::write(folder.join("installed.json"), lock).expect("a note of what is installed");
    }
    let server = server();
    let output =
        run(Command::new(node).args(["script.mjs", &server.endpoint()]).current_dir(&folder), "", COMMAND_WITHIN);
    assert!(output.status.success(), "{}", shown(&output));
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim_end().lines().last(), Some("all well"));
}

#[test]
fn rust_client_etcd_client_works() {
    // A workspace of its own: its build needs a protoc, ours must not. It brings one along unless PROTOC says where one is.
    let cargo = |package: &str, args: &[&str]| {
        let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.args(["run", "--quiet", "--locked", "--package", package]).current_dir(scripts().join("rust"));
        command.env("CARGO_TARGET_DIR", workshop("clients-rust")).arg("--").args(args);
        command
    };
    let protoc = env::var("PROTOC").unwrap_or_else(|_| {
        let output = run(&mut cargo("protoc-path", &[]), "", BUILD_WITHIN);
        assert!(output.status.success(), "{}", shown(&output));
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    });
    let server = server();
    let output = run(cargo("etcd-client-check", &[&server.endpoint()]).env("PROTOC", protoc), "", BUILD_WITHIN);
    assert!(output.status.success(), "{}", shown(&output));
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim_end().lines().last(), Some("all well"));
}
