//! What a member refuses to start on, each with a text that says what to do; what it repairs; and a full disk (D-23,
//! D-24, D-28).

mod common;

use std::{
    fs::{self, File},
    os::unix::{fs::FileExt, process::ExitStatusExt},
    path::{Path, PathBuf},
    process::{Command, Output},
    time::{Duration, Instant},
};

use actd::pb::etcdserverpb::{HashKvRequest, HashKvResponse, PutRequest, RangeRequest, WatchCreateRequest};
use common::{
    Client, EventRecord, Server,
    calls::{Op, Watching, all, delete, everything, put},
};
use rustix::process::Signal;

const PATIENCE: Duration = Duration::from_secs(60);

fn program() -> PathBuf {
    common::server_under_test(env!("CARGO_BIN_EXE_actd"))
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

/// Starts a member on `data` that is expected to end by itself.
fn try_start(data: &Path) -> Output {
    let [port] = common::free_ports();
    let endpoint = format!("http://127.0.0.1:{port}");
    Command::new(program())
        .args(["--data-dir", &data.display().to_string()])
        .args(["--listen-client-urls", &endpoint, "--advertise-client-urls", &endpoint])
        .output()
        .expect("it runs")
}

fn refused(data: &Path, words: &[&str]) {
    let output = try_start(data);
    let log = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{log}");
    for word in words {
        assert!(log.contains(word), "{word:?} is not in:\n{log}");
    }
}

async fn fill(server: &Server, from: u64, count: u64) {
    let mut client = Client::connect(server).await;
    for i in from..from + count {
        let put = PutRequest { key: format!("k{i}").into(), value: vec![b'v'; 100].into(), ..Default::default() };
        client.kv.put(put).await.expect("a put");
    }
}

fn data_dir(server: &Server) -> PathBuf {
    fs::read_dir(server.folder())
        .expect("the server's folder")
        .map(|entry| entry.expect("an entry").path())
        .find(|path| path.join("member").is_dir())
        .expect("a data directory")
}

fn copy(from: &Path, to: &Path) {
    let done = Command::new("cp").arg("-a").arg(from).arg(to).status().expect("cp runs");
    assert!(done.success());
}

/// A member's data after some puts and checkpoints, with the log's first segments in place.
fn filled(flags: &[&str]) -> (tempfile::TempDir, PathBuf) {
    let mut server = Server::start(&program(), flags);
    runtime().block_on(fill(&server, 0, 300));
    // A checkpoint follows a sync of the store, twice a second.
    let deadline = Instant::now() + PATIENCE;
    while server.metric("actd_store_sync_duration_seconds_count").is_none_or(|n| n < 2.0) {
        assert!(Instant::now() < deadline, "the store is never synced");
        runtime().block_on(fill(&server, 0, 20));
        common::pause();
    }
    assert_eq!(server.terminate().signal(), Some(Signal::TERM.as_raw()));
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path().join("data");
    copy(&data_dir(&server), &data);
    (folder, data)
}

fn wal_files(data: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(data.join("member/wal"))
        .expect("the log")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.extension().is_some_and(|e| e == "wal"))
        .collect();
    files.sort();
    files
}

#[test]
fn foreign_database_is_refused_and_kept() {
    let folder = tempfile::tempdir().expect("a folder");
    let snap = folder.path().join("member/snap");
    fs::create_dir_all(&snap).expect("a folder");
    fs::write(snap.join("db"), b"some database").expect("a file");
    refused(folder.path(), &["member/snap/db"]);
    assert_eq!(fs::read(snap.join("db")).expect("still there"), b"some database");
}

#[test]
fn store_without_its_log_and_log_without_its_store_are_refused() {
    let (_folder, data) = filled(&["--snapshot-count=50", "--snapshot-catchup-entries=10"]);
    // The log was replaced by a new one: the store is ahead of it.
    let kept = data.join("kept-wal");
    fs::rename(data.join("member/wal"), &kept).expect("a move");
    refused(&data, &["the log was lost or replaced"]);
    fs::remove_dir_all(data.join("member/wal")).expect("the new log goes");
    fs::rename(&kept, data.join("member/wal")).expect("a move");
    // The store is gone, and the log begins after a checkpoint (D-24).
    let kept = data.join("kept-store");
    fs::rename(data.join("member/store"), &kept).expect("a move");
    refused(&data, &["there was a store"]);
}

#[test]
fn damage_in_the_middle_is_refused_and_a_torn_end_is_cut() {
    let (_folder, data) = filled(&[]);
    let file = wal_files(&data).pop().expect("a segment");
    let whole = fs::read(&file).expect("the segment");
    // Some bytes of a record far from the end.
    let mut damaged = whole.clone();
    for byte in &mut damaged[5_000..5_004] {
        *byte ^= 0x55;
    }
    fs::write(&file, &damaged).expect("written");
    let name = file.file_name().expect("a name").to_string_lossy().into_owned();
    refused(&data, &[&name, "offset"]);

    // A record that was being written when the power went: dropped, with a copy of the file kept.
    let end = (whole.iter().rposition(|byte| *byte != 0).expect("records") / 8 + 1) * 8;
    let mut torn = whole[..end].to_vec();
    torn.extend_from_slice(&64_u64.to_le_bytes());
    torn.extend_from_slice(b"\x08\x02\x10 half");
    fs::write(&file, &torn).expect("written");
    let mut server = Server::start(&program(), &[]);
    server.kill();
    let own = data_dir(&server);
    fs::remove_dir_all(&own).expect("the server's own data goes");
    copy(&data, &own);
    server.restart();
    assert!(server.stderr_tail().contains("cut the torn end"), "{}", server.stderr_tail());
    runtime().block_on(async {
        let mut client = Client::connect(&server).await;
        let range = RangeRequest { key: "k0".into(), ..Default::default() };
        assert_eq!(client.kv.range(range).await.expect("a read").into_inner().count, 1);
    });
}

/// The newest journal of a member's store.
struct Journal {
    path: PathBuf,
    /// The file beside that notes how far the journal was synced: two slots, the one with the higher generation holds.
    note: PathBuf,
}

impl Journal {
    const NAME: &str = "0.jnl";

    fn of(data: &Path) -> Self {
        let store = data.join("member/store/0");
        let journals = fs::read_dir(store.join("rows")).expect("the store's rows").map(|e| e.expect("an entry").path());
        let journals: Vec<PathBuf> = journals.filter(|p| p.extension().is_some_and(|e| e == "jnl")).collect();
        assert_eq!(journals, [store.join("rows").join(Self::NAME)], "so little needs no second one");
        Self { path: store.join("rows").join(Self::NAME), note: store.join("synced") }
    }

    fn synced(&self) -> u64 {
        let note = fs::read(&self.note).expect("the note");
        let word = |at: usize| u64::from_le_bytes(note[at..at + 8].try_into().expect("eight bytes"));
        let slots = [0, 4096].into_iter().filter(|at| note.len() >= at + 36);
        let newest = slots.max_by_key(|at| word(at + 8)).expect("a slot");
        assert_eq!((&note[newest..newest + 8], word(newest + 16)), (&b"actdsync"[..], 0), "a note of this journal");
        word(newest + 24)
    }

    /// Where what was written ends: space that waits for use is zero.
    fn end(&self) -> u64 {
        let mut written = vec![0; 4 << 20];
        let length = File::open(&self.path).and_then(|file| file.read_at(&mut written, 0)).expect("the journal");
        written.truncate(length);
        assert_ne!(written.last(), None);
        written.iter().rposition(|byte| *byte != 0).map_or(0, |last| last as u64 + 1)
    }

    /// What a disk leaves that had not written this piece.
    fn zero(&self, at: u64, length: usize) {
        let file = File::options().write(true).open(&self.path).expect("the journal");
        file.write_all_at(&vec![0; length], at).expect("written");
    }
}

/// All a client can see of the rows, now and in the past.
#[derive(Debug, PartialEq)]
struct Seen {
    revision: i64,
    compacted: i64,
    keys: Vec<bytes::Bytes>,
    hashes: Vec<(u32, i64, i64)>,
    counts: Vec<i64>,
    history: Vec<EventRecord>,
}

impl Seen {
    async fn by(client: &mut Client, compacted: i64) -> Self {
        let now = client.range(everything()).await.expect("a read");
        let revision = now.header.expect("a header").revision;
        let (mut hashes, mut counts) = (Vec::new(), Vec::new());
        for revision in [compacted, (compacted + revision) / 2, revision] {
            let past = RangeRequest { revision, count_only: true, ..everything() };
            counts.push(client.range(past).await.expect("a read of the past").count);
            if revision == compacted {
                continue; // its hash is noted when it is compacted and goes with the process
            }
            let answer = client.maintenance.hash_kv(HashKvRequest { revision }).await.expect("a hash").into_inner();
            let HashKvResponse { hash, compact_revision, hash_revision, .. } = answer;
            hashes.push((hash, compact_revision, hash_revision));
        }
        let create = WatchCreateRequest {
            key: "\0".into(),
            range_end: "\0".into(),
            start_revision: compacted,
            ..Default::default()
        };
        let mut watching = Watching::on(client, create).await;
        let mut history: Vec<EventRecord> = Vec::new();
        while history.last().is_none_or(|event| event.kv.as_ref().expect("a record").mod_revision < revision) {
            history.extend(watching.next().await.events.iter().map(EventRecord::decode_raw));
        }
        Self { revision, compacted, keys: now.kvs.into_iter().map(|kv| kv.0).collect(), hashes, counts, history }
    }
}

#[test]
fn torn_end_of_the_stores_journal_is_cut_and_written_again_from_the_log() {
    let mut server = Server::start(&program(), &[]);
    runtime().block_on(fill(&server, 0, 100));
    let journal = Journal::of(&server.data_dir());
    let deadline = Instant::now() + PATIENCE;
    while journal.synced() != journal.end() {
        assert!(Instant::now() < deadline, "the store is never synced");
        common::pause();
    }
    let (synced, note) = (journal.synced(), fs::read(&journal.note).expect("the note"));
    let seen = runtime().block_on(async {
        let mut client = Client::connect(&server).await;
        fill(&server, 50, 200).await;
        for i in (0..250).step_by(10) {
            client.delete(delete(format!("k{i}"))).await.expect("a delete");
        }
        let compacted = client.revision().await;
        client.compact(compacted, true).await.expect("a compaction");
        client.txn(all([put("k1", "left").op(), put("k2", "right").op(), delete("k3").op()])).await.expect("a txn");
        fill(&server, 200, 200).await;
        Seen::by(&mut client, compacted).await
    });
    assert_eq!((seen.counts[0], seen.keys.len()), (225, 379), "the history has both, and they differ");
    server.kill();
    // A sync may have come meanwhile. With the note of the last one before, the disk is one on which it had not.
    fs::write(&journal.note, note).expect("written");
    let end = journal.end();
    assert!(end - synced > 64 << 10, "only {} bytes are not synced", end - synced);

    let damaged = |at: u64, length: usize| {
        let member = Server::stopped_in(&std::env::temp_dir(), &program(), &[]);
        copy(&server.data_dir(), &member.data_dir());
        Journal::of(&member.data_dir()).zero(at, length);
        member
    };
    for length in [4096, 512] {
        let aligned = |at: u64| at / length * length;
        // The last piece keeps its end: behind nothing but zeros nothing is torn.
        for at in [aligned(synced) + length, aligned((synced + end) / 2), aligned(end - 1) - length] {
            let mut member = damaged(at, length as usize);
            member.restart();
            let log = member.stderr_tail();
            assert!(log.contains("cut the torn end of the store's journal"), "{length} bytes at {at}:\n{log}");
            let again = runtime().block_on(async {
                let mut client = Client::connect(&member).await;
                Seen::by(&mut client, seen.compacted).await
            });
            assert!(again == seen, "{length} bytes at {at}: {again:?}\nis not\n{seen:?}");
        }
        let member = damaged(aligned(synced / 2), length as usize);
        refused(
            &member.data_dir(),
            &[
                Journal::NAME,
                &format!("is damaged, which was synced: {synced} bytes were"),
                "Move the member's data directory away and let it join again, or restore a backup",
            ],
        );
    }
}

#[test]
fn member_without_fsync_serves_and_restarts() {
    let mut server = Server::start(&program(), &["--unsafe-no-fsync"]);
    runtime().block_on(fill(&server, 0, 100));
    assert_eq!(server.metric("etcd_disk_wal_fsync_duration_seconds_count").map(|n| n < 50.0), Some(true));
    server.kill();
    server.restart();
    runtime().block_on(async {
        let mut client = Client::connect(&server).await;
        let range = RangeRequest { key: "k".into(), range_end: "l".into(), ..Default::default() };
        assert_eq!(client.kv.range(range).await.expect("a read").into_inner().count, 100);
    });
}

#[test]
fn stop_under_load_is_clean_every_time() {
    let mut server = Server::start(&program(), &[]);
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    for round in 0..10 {
        let mut writers = Vec::new();
        for writer in 0..16 {
            let mut client = runtime.block_on(Client::connect(&server));
            writers.push(runtime.spawn(async move {
                let put = |i: u64| PutRequest { key: format!("{writer}/{i}").into(), ..Default::default() };
                let mut i = 0;
                while client.kv.put(put(i)).await.is_ok() {
                    i += 1;
                }
                i
            }));
        }
        let deadline = Instant::now() + PATIENCE;
        let before = server.metric("etcd_mvcc_put_total").unwrap_or(0.0);
        while server.metric("etcd_mvcc_put_total").is_none_or(|n| n < before + 100.0) {
            assert!(Instant::now() < deadline, "no load");
            common::pause();
        }
        assert_eq!(server.terminate().signal(), Some(Signal::TERM.as_raw()), "round {round}: {}", server.stderr_tail());
        for writer in writers {
            runtime.block_on(writer).expect("a writer ends");
        }
        server.restart();
    }
}

#[test]
fn stopped_member_dies_of_the_signal_that_stopped_it() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut server = Server::start(&program(), &[]);
        let put = PutRequest { key: "k".into(), ..Default::default() };
        runtime().block_on(async { Client::connect(&server).await.kv.put(put).await.expect("a put") });
        let status = server.stop(signal);
        assert_eq!((status.signal(), status.code()), (Some(signal.as_raw()), None), "{}", server.stderr_tail());
        // And not at once: it has stopped in order.
        assert!(server.stderr_tail().contains("stopped"), "{}", server.stderr_tail());
    }
}

/// A small file system of its own; `None` where the kernel does not let us have one.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn new(megabytes: u32) -> Option<Self> {
        let folder = tempfile::tempdir().expect("a folder");
        let size = format!("size={megabytes}m");
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(folder.path()).output();
        mount.is_ok_and(|output| output.status.success()).then_some(Self(folder))
    }

    fn grow(&self, megabytes: u32) {
        let size = format!("remount,size={megabytes}m");
        let done = Command::new("mount").args(["-o", &size]).arg(self.0.path()).status().expect("mount runs");
        assert!(done.success());
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

#[test]
fn full_disk_ends_the_process_and_loses_nothing_acknowledged() {
    let Some(disk) = SmallDisk::new(150) else {
        return common::left_out("no small file system can be mounted here");
    };
    let mut server = Server::start_in(disk.0.path(), &program(), &[]);
    let acknowledged = runtime().block_on(async {
        let mut client = Client::connect(&server).await;
        let mut acknowledged = 0_u64;
        // Twice the disk at most.
        for i in 0..3_000_u64 {
            let value = i.to_be_bytes().repeat(12_800);
            let put = PutRequest { key: format!("k{i}").into(), value: value.into(), ..Default::default() };
            match tokio::time::timeout(PATIENCE, client.kv.put(put)).await {
                Ok(Ok(_)) => acknowledged += 1,
                Ok(Err(_)) => break,
                Err(_) => panic!("a put on a full disk is neither refused nor ended"),
            }
        }
        acknowledged
    });
    assert!((100..2_900).contains(&acknowledged), "the disk was never full: {acknowledged} puts");
    let log = server.stderr_tail();
    assert!(log.contains("No space left") || log.contains("os error 28"), "the log does not say why:\n{log}");
    server.kill();
    disk.grow(1_500);
    server.restart();
    runtime().block_on(async {
        let mut client = Client::connect(&server).await;
        for i in 0..acknowledged {
            let range = RangeRequest { key: format!("k{i}").into(), ..Default::default() };
            let found = client.kv.range(range).await.expect("a read").into_inner().kvs;
            let value = found.first().map(|kv| kv.decode_record().expect("a record").value);
            assert_eq!(value.as_deref(), Some(&i.to_be_bytes().repeat(12_800)[..]), "k{i} was acknowledged");
        }
    });
    println!("{acknowledged} puts of 100 KiB before the disk was full, all there");
}
