//! Which directory is the store: `<data-dir>/member/store/`.
//!
//! ```text
//! LOCK       held while a process uses the store
//! CURRENT    name of the directory in use; replaced by rename
//! <name>/    a complete store
//! <name>.new one being built
//! ```
//!
//! A snapshot is installed by building `<name>.new`, completing it to `<name>` and renaming CURRENT over.
//! Directories CURRENT does not name are deleted by [`StoreDir::delete_leftovers`], never without CURRENT.

use super::{Error, FjallStorage, Options};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

const CURRENT: &str = "CURRENT";
const LOCK: &str = "LOCK";
const BUILDING: &str = ".new";
/// The store a first start creates.
const FIRST: &str = "0";

/// An etcd database beside no store of ours is a member's data that must not be ignored.
pub fn refuse_foreign(data_dir: &Path) -> Result<(), Error> {
    let database = data_dir.join("member/snap/db");
    let ours = data_dir.join("member/store").join(CURRENT);
    if exists(&database)? && !exists(&ours)? {
        return Err(Error::Refused(format!(
            "{} is the database of an etcd member, and {} holds no store of actd. actd does not take over \
             etcd's files in place, nor what etcdutl restores: start etcd with them, add this member to its cluster \
             and start it with an empty data directory, and it gets the data from there",
            database.display(),
            data_dir.display()
        )));
    }
    Ok(())
}

/// The directory of stores, locked for this process.
#[derive(Debug)]
pub struct StoreDir {
    root: PathBuf,
    _lock: File,
}

impl StoreDir {
    /// Creates what is missing (0700) and takes the lock.
    pub fn open(data_dir: &Path) -> Result<Self, Error> {
        refuse_foreign(data_dir)?;
        let root = data_dir.join("member/store");
        DirBuilder::new().recursive(true).mode(0o700).create(&root).map_err(|e| failed(&root, e))?;
        let path = root.join(LOCK);
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        let lock = lock.map_err(|e| failed(&path, e))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                let text = format!("{} is locked: another process uses this data directory", path.display());
                return Err(Error::Refused(text));
            }
            Err(e) => return Err(failed(&path, e.into())),
        }
        for dir in [data_dir, &data_dir.join("member"), &root] {
            sync_dir(dir)?;
        }
        Ok(Self { root, _lock: lock })
    }

    /// Opens the store CURRENT names, after deleting leftovers; a first start creates an empty one.
    pub fn open_current(&self, options: &Options) -> Result<FjallStorage, Error> {
        let name = match self.current()? {
            Some(name) => name,
            None => {
                if let Some(name) = self.complete_stores()?.first() {
                    return Err(Error::Refused(format!(
                        "{} is missing, but {} is a store. Write its name into CURRENT if it is the one to use, \
                         or move it away",
                        self.root.join(CURRENT).display(),
                        self.root.join(name).display()
                    )));
                }
                // CURRENT before the store is complete: a store without it is never taken for a leftover.
                let building = self.building(FIRST);
                std::fs::create_dir_all(&building).map_err(|e| failed(&building, e))?;
                sync_dir(&self.root)?;
                self.switch_to(FIRST)?;
                FIRST.to_owned()
            }
        };
        let dir = self.path(&name);
        if !exists(&dir)? {
            if name != FIRST || !exists(&self.building(FIRST))? {
                return Err(Error::Refused(format!(
                    "{} names the store {}, which does not exist. Restore it, or give this member an empty data \
                     directory and let it join its cluster again",
                    self.root.join(CURRENT).display(),
                    dir.display()
                )));
            }
            drop(self.build(FIRST, options)?);
            self.complete(FIRST)?;
        }
        self.delete_leftovers(&[&name])?;
        FjallStorage::open(&dir, options)
    }

    /// The directory in use, or `None` before the first start.
    pub fn current(&self) -> Result<Option<String>, Error> {
        let path = self.root.join(CURRENT);
        match std::fs::read_to_string(&path) {
            Ok(text) => {
                let name = text.trim_end();
                if !is_name(name) {
                    let text = format!("{}: {name:?} is no name of a store; write one into it", path.display());
                    return Err(Error::Refused(text));
                }
                Ok(Some(name.to_owned()))
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(failed(&path, e)),
        }
    }

    /// Where the complete store `name` is.
    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// An empty store to be filled; drop it before [`Self::complete`].
    pub fn build(&self, name: &str, options: &Options) -> Result<FjallStorage, Error> {
        assert!(is_name(name), "a store is named by letters, digits and '-': {name:?}");
        let dir = self.building(name);
        // Emptied and not replaced: at a first start the directory is the proof that there was no complete store yet.
        empty(&dir).map_err(|e| failed(&dir, e))?;
        FjallStorage::create(&dir, options)
    }

    /// Makes a built store one that may be switched to. The builder has synced it.
    pub fn complete(&self, name: &str) -> Result<(), Error> {
        self.complete_as(name, name)
    }

    /// As [`Self::complete`], under another name than it was built by.
    pub fn complete_as(&self, built: &str, name: &str) -> Result<(), Error> {
        assert!(is_name(name), "a store is named by letters, digits and '-': {name:?}");
        let from = self.building(built);
        sync_dir(&from)?;
        std::fs::rename(&from, self.path(name)).map_err(|e| failed(&from, e))?;
        sync_dir(&self.root)
    }

    /// Deletes the store `name`, complete or not, if there is one. It must not be in use.
    pub fn discard(&self, name: &str) -> Result<(), Error> {
        assert!(self.current()?.as_deref() != Some(name), "the store in use is not deleted");
        for dir in [self.path(name), self.building(name)] {
            if exists(&dir)? {
                std::fs::remove_dir_all(&dir).map_err(|e| failed(&dir, e))?;
            }
        }
        Ok(())
    }

    /// From now on `name` is the store in use. Durable when it returns.
    pub fn switch_to(&self, name: &str) -> Result<(), Error> {
        assert!(is_name(name), "a store is named by letters, digits and '-': {name:?}");
        let path = self.root.join(CURRENT);
        let new = self.root.join(format!("{CURRENT}{BUILDING}"));
        let write = || {
            let mut file = File::create(&new)?;
            writeln!(file, "{name}")?;
            file.sync_all()?;
            std::fs::rename(&new, &path)
        };
        write().map_err(|e| failed(&path, e))?;
        sync_dir(&self.root)
    }

    /// Deletes every store, complete or not, that is not in `keep`. Refuses to delete the one in use.
    pub fn delete_leftovers(&self, keep: &[&str]) -> Result<(), Error> {
        let current = self.current()?;
        for name in self.entries()? {
            let kept = keep.contains(&name.as_str()) || current.as_deref() == Some(&name);
            let ours = is_name(name.strip_suffix(BUILDING).unwrap_or(&name));
            let path = self.root.join(&name);
            if !kept && ours && path.is_dir() {
                std::fs::remove_dir_all(&path).map_err(|e| failed(&path, e))?;
            }
        }
        Ok(())
    }

    fn building(&self, name: &str) -> PathBuf {
        self.root.join(format!("{name}{BUILDING}"))
    }

    fn complete_stores(&self) -> Result<Vec<String>, Error> {
        let names = self.entries()?.into_iter();
        Ok(names.filter(|name| is_name(name) && self.root.join(name).is_dir()).collect())
    }

    fn entries(&self) -> Result<Vec<String>, Error> {
        let entries = std::fs::read_dir(&self.root).map_err(|e| failed(&self.root, e))?;
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|e| failed(&self.root, e))?;
            names.extend(entry.file_name().into_string());
        }
        names.sort();
        Ok(names)
    }
}

fn is_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

fn exists(path: &Path) -> Result<bool, Error> {
    path.try_exists().map_err(|e| failed(path, e))
}

/// Deletes what is in a directory, if there is one.
fn empty(dir: &Path) -> io::Result<()> {
    let entries = match std::fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            std::fs::remove_dir_all(entry.path())?;
        } else {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn sync_dir(path: &Path) -> Result<(), Error> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(|e| failed(path, e))
}

fn failed(path: &Path, error: io::Error) -> Error {
    Error::Fatal(format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::storage::{Bucket, Storage, WriteBatch};

    fn mark(store: &FjallStorage, mark: &'static str) {
        let mut batch = WriteBatch::default();
        batch.put(Bucket::Meta, "mark", mark);
        store.commit(batch).unwrap();
        store.sync().unwrap();
    }

    fn marked(store: &FjallStorage) -> Option<bytes::Bytes> {
        store.get(Bucket::Meta, b"mark").unwrap()
    }

    fn refusal<T>(result: Result<T, Error>) -> String {
        match result {
            Err(Error::Refused(text)) => text,
            Err(e) => panic!("not refused but {e}"),
            Ok(_) => panic!("not refused"),
        }
    }

    #[test]
    fn etcd_database_beside_no_store_refuses_by_name() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("member/snap")).unwrap();
        refuse_foreign(dir.path()).unwrap();
        std::fs::write(dir.path().join("member/snap/db"), "bolt").unwrap();
        let text = refusal(StoreDir::open(dir.path()));
        assert!(text.contains("member/snap/db") && text.contains("start etcd with them"), "{text}");
        assert!(text.contains("nor what etcdutl restores"), "what it advises must not end here again: {text}");
        assert!(!dir.path().join("member/store").exists());
        // Beside a store of ours it is no business of the store's.
        std::fs::remove_file(dir.path().join("member/snap/db")).unwrap();
        drop(StoreDir::open(dir.path()).unwrap().open_current(&Options::default()).unwrap());
        std::fs::write(dir.path().join("member/snap/db"), "bolt").unwrap();
        refuse_foreign(dir.path()).unwrap();
    }

    #[test]
    fn second_process_is_kept_out() {
        let dir = tempfile::tempdir().unwrap();
        let first = StoreDir::open(dir.path()).unwrap();
        let text = refusal(StoreDir::open(dir.path()));
        assert!(text.contains("member/store/LOCK is locked"), "{text}");
        drop(first);
        StoreDir::open(dir.path()).unwrap();
    }

    #[test]
    fn current_names_the_store_and_leftovers_go() {
        let dir = tempfile::tempdir().unwrap();
        let options = Options::default();
        let stores = StoreDir::open(dir.path()).unwrap();
        assert_eq!(stores.current().unwrap(), None);
        let first = stores.open_current(&options).unwrap();
        mark(&first, "first");
        // A second one is built beside it and does not matter until CURRENT names it.
        mark(&stores.build("7", &options).unwrap(), "second");
        stores.complete("7").unwrap();
        drop(stores.build("8", &options).unwrap());
        assert_eq!(stores.current().unwrap().as_deref(), Some("0"));
        stores.switch_to("7").unwrap();
        drop(first);
        assert_eq!(marked(&stores.open_current(&options).unwrap()).unwrap(), "second");
        let mut left: Vec<_> = stores.entries().unwrap();
        left.sort();
        assert_eq!(left, ["7", "CURRENT", "LOCK"]);
    }

    #[test]
    fn crash_while_building_the_first_store_is_made_good() {
        let dir = tempfile::tempdir().unwrap();
        let stores = StoreDir::open(dir.path()).unwrap();
        stores.switch_to(FIRST).unwrap();
        let building = stores.root.join("0.new");
        std::fs::create_dir_all(building.join("rows")).unwrap();
        std::fs::write(building.join("format"), "half").unwrap();
        // Held, so that its number goes to no other directory.
        let held = File::open(&building).unwrap();
        let store = stores.open_current(&Options::default()).unwrap();
        assert_eq!(marked(&store), None);
        // It was there all the time: had it been away, a crash then would have left a store that seems lost.
        let number = |file: &File| file.metadata().unwrap().ino();
        assert_eq!(number(&held), number(&File::open(stores.path("0")).unwrap()));
    }

    #[test]
    fn store_without_current_and_current_without_store_refuse() {
        let dir = tempfile::tempdir().unwrap();
        let options = Options::default();
        let stores = StoreDir::open(dir.path()).unwrap();
        mark(&stores.open_current(&options).unwrap(), "kept");
        std::fs::remove_file(stores.root.join(CURRENT)).unwrap();
        let text = refusal(stores.open_current(&options));
        assert!(text.contains("CURRENT is missing") && text.contains("store/0 is a store"), "{text}");
        stores.switch_to("9").unwrap();
        let text = refusal(stores.open_current(&options));
        assert!(text.contains("store/9, which does not exist"), "{text}");
        // The first store is no exception once it was complete.
        std::fs::rename(stores.path("0"), stores.path("1")).unwrap();
        stores.switch_to("0").unwrap();
        let text = refusal(stores.open_current(&options));
        assert!(text.contains("store/0, which does not exist"), "{text}");
        std::fs::rename(stores.path("1"), stores.path("0")).unwrap();
        std::fs::write(stores.root.join(CURRENT), "../0").unwrap();
        let text = refusal(stores.open_current(&options));
        assert!(text.contains("no name of a store"), "{text}");
        stores.switch_to("0").unwrap();
        assert_eq!(marked(&stores.open_current(&options).unwrap()).unwrap(), "kept");
    }
}
