//! Between the transport and the rest of the member: messages to raft, databases out of the store and into one.

use std::{
    fs::File,
    io::{self, Write},
    path::PathBuf,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use anyhow::Context;
use bytes::Bytes;
use futures_util::{FutureExt, future::BoxFuture};
use tokio::sync::{Mutex, mpsc, oneshot};

use crate::{
    actor::Gate,
    api::Server,
    apply,
    pb::raftpb::{Message, MessageType, Snapshot, SnapshotMetadata},
    peer::{Chunks, Databases, Incoming},
    raft::{self, Input, Install, message_bytes},
    snapshot::{
        self,
        checksum::Checksum,
        export::Export,
        import::{self, Expected},
        v2,
    },
    storage::{FjallStorage, Options, Storage, StoreDir, StoreInUse},
};

/// What other members send goes to raft if there is room for it.
pub struct ToRaft {
    server: Arc<Server>,
    gate: Gate,
}

impl ToRaft {
    pub fn new(server: Arc<Server>, gate: Gate) -> Self {
        Self { server, gate }
    }
}

impl Incoming for ToRaft {
    fn message(&self, message: Message) {
        // It counts only with its database, which comes another way.
        if message.r#type() == MessageType::MsgSnap {
            self.server.raft_status.messages_refused.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(
                from = format!("{:x}", message.from()),
                "a peer's snapshot without its database is not taken"
            );
            return;
        }
        let taken = self.gate.try_enter(message_bytes(&message)).is_some_and(|permit| {
            let input = Input::Step(Box::new(message), permit);
            self.server.raft.try_send(input).is_ok()
        });
        if !taken {
            self.server.raft_status.messages_dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn unreachable(&self, id: u64) {
        self.server.raft.control(raft::Control::Unreachable(id));
    }

    fn snapshot_sent(&self, to: u64, delivered: bool) {
        self.server.raft.control(raft::Control::SnapshotSent { to, delivered });
    }

    fn is_removed(&self, id: u64) -> bool {
        self.server.view.load().members.is_removed(id)
    }

    fn removed_here(&self) {
        self.server.removed.notify_one();
    }
}

/// Where databases come from and go to.
pub struct Stores {
    pub server: Arc<Server>,
    pub in_use: Arc<StoreInUse>,
    pub dir: Arc<StoreDir>,
    /// Where a database lies while it comes in.
    pub incoming: PathBuf,
    /// One comes in at a time.
    pub receiving: Arc<Mutex<()>>,
    /// Whose threads may block.
    pub runtime: tokio::runtime::Handle,
}

/// A store is opened at most this long after it was asked for.
const APPLY_WAIT: Duration = Duration::from_secs(30);
/// Chunks between the reader of rows and the connection.
const CHUNKS_MAX: usize = 8;

impl Databases for Stores {
    fn open(&self, order: Message) -> BoxFuture<'static, io::Result<(Message, Chunks)>> {
        let (server, storage, runtime) = (self.server.clone(), self.in_use.clone(), self.runtime.clone());
        async move {
            let least = order.snapshot.as_ref().and_then(|s| s.metadata.as_ref()).and_then(|m| m.index).unwrap_or(0);
            let applied = server.view.until(|view| view.applied_index >= least);
            tokio::time::timeout(APPLY_WAIT, applied).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?;
            let (begin, begun) = oneshot::channel();
            let (chunks, taken) = mpsc::channel(CHUNKS_MAX);
            runtime.spawn_blocking(move || send(&*storage, order, begin, &chunks));
            let message = begun.await.map_err(|_| io::Error::other("the snapshot could not be begun"))??;
            Ok((message, taken))
        }
        .boxed()
    }

    fn receive(&self, message: Message, database: Chunks) -> BoxFuture<'static, Result<(), String>> {
        let (server, dir, path) = (self.server.clone(), self.dir.clone(), self.incoming.clone());
        let (receiving, runtime) = (self.receiving.clone(), self.runtime.clone());
        async move {
            let _one = receiving.lock_owned().await;
            let meta = message.snapshot.as_ref().and_then(|s| s.metadata.clone()).unwrap_or_default();
            let expected = Expected {
                index: meta.index.unwrap_or(0),
                term: meta.term.unwrap_or(0),
                conf_state: meta.conf_state.unwrap_or_default(),
                checksum: message.context.as_deref().and_then(Checksum::from_context),
            };
            let index = expected.index;
            let is_news = index > server.view.load().applied_index;
            let (metrics, began) = (server.metrics.clone(), Instant::now());
            let stores = dir.clone();
            let prepare = move || take_in(&path, database, is_news.then_some((&*stores, &expected)));
            runtime
                .spawn_blocking(prepare)
                .await
                .map_err(anyhow::Error::from)
                .flatten()
                .map_err(|e| format!("failed to save KV snapshot ({e:#})"))?;
            metrics.snapshot_saves.record(began.elapsed());
            let (taken, answer) = oneshot::channel();
            server.raft.control(raft::Control::Snapshot(Box::new(message), taken));
            match answer.await {
                // The next one waits until this one is in use, however long that is: it might be of the same index, and
                // nobody may touch a store that the log names.
                Ok(true) => _ = server.view.until(|view| view.applied_index >= index).await,
                Ok(false) => {
                    tracing::info!(index, "raft has no use for a leader's snapshot");
                    if is_news {
                        let discard = move || import::discard(&dir, index).map_err(anyhow::Error::from);
                        if let Err(e) = runtime.spawn_blocking(discard).await.map_err(anyhow::Error::from).flatten() {
                            tracing::warn!("cannot delete the store of the snapshot at {index}: {e:#}");
                        }
                    }
                }
                Err(_) => return Err("failed to process raft message (the member stops)".to_owned()),
            }
            Ok(())
        }
        .boxed()
    }
}

/// Reads the rows as they stand now into `chunks`; first tells which state that is.
fn send(
    storage: &dyn Storage,
    mut order: Message,
    begin: oneshot::Sender<io::Result<Message>>,
    chunks: &mpsc::Sender<io::Result<Bytes>>,
) {
    let make = || -> Result<_, snapshot::Error> {
        let export = Export::take(storage)?;
        let layout = export.measure(&mut || !begin.is_closed())?;
        Ok((export, layout))
    };
    let (export, layout) = match make() {
        Ok(made) => made,
        Err(e) => {
            let _ = begin.send(Err(io::Error::other(e)));
            return;
        }
    };
    let metadata = SnapshotMetadata {
        conf_state: Some(export.members().conf_state()),
        index: Some(export.index()),
        term: Some(export.term()),
    };
    order.context = Some(layout.checksum.to_context().into());
    order.snapshot = Some(Snapshot { data: Some(v2::tree(export.members()).into()), metadata: Some(metadata) });
    if begin.send(Ok(order)).is_err() {
        return;
    }
    let sent = export.send(&layout, &mut |chunk| chunks.blocking_send(Ok(chunk)).map_err(|_| snapshot::Error::Gone));
    match sent {
        Ok(()) | Err(snapshot::Error::Gone) => {}
        Err(e) => {
            let _ = chunks.blocking_send(Err(io::Error::other(e)));
        }
    }
}

/// Writes a database to a file and makes a complete store of it, if it is worth one.
fn take_in(path: &PathBuf, mut database: Chunks, store: Option<(&StoreDir, &Expected)>) -> anyhow::Result<()> {
    let mut file = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
    // Without a name nothing is left of it, whatever happens.
    std::fs::remove_file(path)?;
    while let Some(chunk) = database.blocking_recv() {
        file.write_all(&chunk?).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if let Some((dir, expected)) = store {
        import::prepare(Box::new(file), dir, Some(expected))?;
    }
    Ok(())
}

/// Makes the store of a snapshot the one in use, and reads its state.
pub fn install(
    install: Install,
    in_use: &Arc<StoreInUse>,
    dir: &StoreDir,
    options: &Options,
    settings: &apply::Settings,
) -> anyhow::Result<apply::Core> {
    let before = dir.current()?;
    import::switch(dir, install.index)?;
    let name = dir.current()?.context("CURRENT was just written")?;
    let new = Arc::new(FjallStorage::open(&dir.path(&name), options)?);
    let mut core = apply::Core::open(new.clone(), settings.clone())?;
    core.members().check_release(settings.release)?;
    anyhow::ensure!(core.applied_index() == install.index, "the store is of index {}", core.applied_index());
    // Last: readers of the view before it find rows gone from now on, and go on when the new view is out.
    let old = in_use.replace(new);
    core.use_storage(in_use.clone());
    if let Some(path) = before.map(|before| dir.path(&before)) {
        // Readers that are under way keep it; what is left at the next start goes then.
        std::thread::Builder::new().name("old-store".into()).spawn(move || {
            #[allow(clippy::disallowed_methods)] // a thread of its own, which has nothing else to do
            while Arc::strong_count(&old) > 1 {
                std::thread::sleep(Duration::from_millis(100));
            }
            drop(old);
            if let Err(e) = std::fs::remove_dir_all(&path) {
                tracing::warn!("cannot delete the store before the snapshot, {}: {e}", path.display());
            }
        })?;
    }
    Ok(core)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::versions::tests::alone;

    #[test]
    fn a_snapshot_without_its_database_is_not_taken() {
        // Raft would put its index in force, and the store would not have what it stands for.
        let dir = tempfile::tempdir().unwrap();
        let (server, inbox) = alone(dir.path());
        let to_raft = ToRaft::new(Arc::new(server), Gate::new("peers", 10, 1 << 20));
        let message = |kind: MessageType| Message { r#type: Some(kind as i32), from: Some(2), ..Message::default() };
        to_raft.message(message(MessageType::MsgSnap));
        assert!(inbox.try_recv().is_none());
        assert_eq!(to_raft.server.raft_status.messages_refused.load(Ordering::Relaxed), 1);
        to_raft.message(message(MessageType::MsgHeartbeat));
        assert!(matches!(inbox.try_recv(), Some(Input::Step(..))));
    }
}
