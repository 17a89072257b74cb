//! Disks for tests and simulation: one in memory that can crash and fail, and one that notes what was synced.
//!
//! [`SimDisk`] keeps for every file and directory both what a program sees and what would survive power loss. A crash
//! leaves, from one seed, a mixture: of what was not synced some sectors are there and some are not, names may be the
//! old or the new ones. [`RecordingDisk`] passes everything on to another disk.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use super::disk::{Disk, File, Open};
use crate::sim::mark;

const SECTOR: usize = 512;

/// A disk in memory. Clones are the same disk.
#[derive(Clone)]
pub struct SimDisk(Arc<Mutex<State>>);

/// What [`SimDisk::fail`] makes go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A write leaves half of its bytes, up to a sector's end, and fails.
    Write,
    /// A sync fails and the system drops what it could not write.
    Sync,
    Rename,
    /// A file cannot be made.
    Create,
}

struct State {
    nodes: Vec<Node>,
    /// Counts crashes. Files that were opened before the last one are dead.
    epoch: u64,
    handle_count: u64,
    faults: Vec<(Fault, u64)>,
    /// Bytes that may still be added to files.
    room: Option<u64>,
    sync_count: u64,
    write_count: u64,
}

enum Node {
    Dir { names: BTreeMap<String, usize>, durable: BTreeMap<String, usize> },
    File(Content),
}

#[derive(Default)]
struct Content {
    bytes: Vec<u8>,
    durable: Vec<u8>,
    /// Numbers of the sectors that differ, or may, from the durable ones.
    dirty: BTreeSet<usize>,
    locked_by: Option<u64>,
}

impl Content {
    fn write(&mut self, offset: usize, bytes: &[u8]) {
        let end = offset + bytes.len();
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        self.bytes[offset..end].copy_from_slice(bytes);
        self.touch(offset, end);
    }

    fn set_size(&mut self, size: usize) {
        let before = self.bytes.len();
        self.bytes.resize(size, 0);
        self.touch(before.min(size), before.max(size));
    }

    fn touch(&mut self, from: usize, to: usize) {
        if from < to {
            self.dirty.extend(from / SECTOR..=(to - 1) / SECTOR);
        }
    }

    fn sync(&mut self) {
        // Only what changed is copied: syncs of a long log stay cheap.
        self.durable.resize(self.bytes.len(), 0);
        for sector in std::mem::take(&mut self.dirty) {
            let from = (sector * SECTOR).min(self.bytes.len());
            let to = (from + SECTOR).min(self.bytes.len());
            self.durable[from..to].copy_from_slice(&self.bytes[from..to]);
        }
    }

    /// Keeps what survives a power loss.
    fn crash(&mut self, random: &mut Random) {
        let (old, new) = (self.durable.len(), self.bytes.len());
        let mode = random.below(4);
        let size = match mode {
            0 => old,
            1 => new,
            _ if new > old => old + random.below((new - old) as u64 + 1) as usize,
            _ => [old, new][random.below(2) as usize],
        };
        let mut image = self.durable.clone();
        image.resize(size, 0);
        let sectors = self.dirty.len() as u64;
        let kept_prefix = random.below(sectors + 1);
        for (position, sector) in std::mem::take(&mut self.dirty).into_iter().enumerate() {
            let is_kept = match mode {
                0 => false,
                1 => true,
                2 => (position as u64) < kept_prefix,
                _ => random.below(2) == 0,
            };
            let from = sector * SECTOR;
            let to = (from + SECTOR).min(new).min(size);
            if is_kept && from < to {
                image[from..to].copy_from_slice(&self.bytes[from..to]);
            }
        }
        if self.bytes != image {
            mark("a power loss took what a file had not synced");
        }
        self.bytes.clone_from(&image);
        self.durable = image;
        self.locked_by = None;
    }
}

/// A small generator, so that a seed gives the same crash everywhere (xorshift64*).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % bound.max(1)
    }
}

impl Default for SimDisk {
    fn default() -> SimDisk {
        SimDisk(Arc::new(Mutex::new(State {
            nodes: vec![Node::Dir { names: BTreeMap::new(), durable: BTreeMap::new() }],
            epoch: 0,
            handle_count: 0,
            faults: Vec::new(),
            room: None,
            sync_count: 0,
            write_count: 0,
        })))
    }
}

impl SimDisk {
    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.0)
    }

    /// Power loss: open files die, and of what was not synced the seed decides what is left.
    pub fn crash(&self, seed: u64) {
        let mut state = self.state();
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        state.epoch += 1;
        state.faults.clear();
        for node in &mut state.nodes {
            match node {
                Node::Dir { names, durable } => {
                    if random.below(2) == 0 {
                        names.clone_from(durable);
                    } else {
                        durable.clone_from(names);
                    }
                }
                Node::File(content) => content.crash(&mut random),
            }
        }
    }

    /// A killed process: open files die, the disk keeps what was written.
    pub fn kill(&self) {
        let mut state = self.state();
        state.epoch += 1;
        state.faults.clear();
        for node in &mut state.nodes {
            if let Node::File(content) = node {
                content.locked_by = None;
            }
        }
    }

    /// Makes the `nth` call from now of this kind fail; 1 is the next one.
    pub fn fail(&self, fault: Fault, nth: u64) {
        self.state().faults.push((fault, nth));
    }

    /// Limits by how many bytes files may still grow.
    pub fn set_room(&self, room: Option<u64>) {
        self.state().room = room;
    }

    /// Nothing goes wrong from now on; what was to fail has not been asked for.
    pub fn calm(&self) {
        let mut state = self.state();
        state.faults.clear();
        state.room = None;
    }

    pub fn sync_count(&self) -> u64 {
        self.state().sync_count
    }

    pub fn write_count(&self) -> u64 {
        self.state().write_count
    }

    /// The content of a file, as a program would see it.
    pub fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let state = self.state();
        let node = state.find(path)?;
        match &state.nodes[node] {
            Node::File(content) => Ok(content.bytes.clone()),
            Node::Dir { .. } => Err(io::ErrorKind::IsADirectory.into()),
        }
    }

    /// Makes or replaces a file, durably.
    pub fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut file = self.open(path, Open::Create)?;
        file.write_at(0, bytes)?;
        file.sync()?;
        self.sync_dir(path.parent().unwrap_or(Path::new("/")))
    }
}

impl State {
    fn find(&self, path: &Path) -> io::Result<usize> {
        let mut at = 0;
        for part in parts(path) {
            at = match &self.nodes[at] {
                Node::Dir { names, .. } => *names.get(&part).ok_or(io::ErrorKind::NotFound)?,
                Node::File(_) => return Err(io::ErrorKind::NotADirectory.into()),
            };
        }
        Ok(at)
    }

    fn names(&mut self, dir: usize) -> io::Result<&mut BTreeMap<String, usize>> {
        match &mut self.nodes[dir] {
            Node::Dir { names, .. } => Ok(names),
            Node::File(_) => Err(io::ErrorKind::NotADirectory.into()),
        }
    }

    /// The directory that holds the path's last part, and that part.
    fn split(&self, path: &Path) -> io::Result<(usize, String)> {
        let mut parts = parts(path);
        let last = parts.pop().ok_or(io::ErrorKind::InvalidInput)?;
        let dir = self.find(&parts.iter().collect::<PathBuf>())?;
        Ok((dir, last))
    }

    /// Whether a call of this kind is to fail.
    fn is_faulty(&mut self, fault: Fault) -> bool {
        let mut failed = false;
        for (kind, left) in &mut self.faults {
            if *kind == fault {
                *left -= 1;
                failed |= *left == 0;
            }
        }
        self.faults.retain(|(_, left)| *left > 0);
        failed
    }
}

fn parts(path: &Path) -> Vec<String> {
    path.components()
        .filter_map(|part| match part {
            std::path::Component::Normal(name) => Some(name.to_string_lossy().into_owned()),
            _ => None,
        })
        .collect()
}

fn injected(fault: Fault) -> io::Error {
    io::Error::other(format!("injected failure: {fault:?}"))
}

impl Disk for SimDisk {
    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let mut state = self.state();
        let dir = state.find(dir)?;
        Ok(state.names(dir)?.keys().cloned().collect())
    }

    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        let mut state = self.state();
        let mut at = 0;
        for part in parts(dir) {
            let made = state.nodes.len();
            let Node::Dir { names, durable } = &mut state.nodes[at] else {
                return Err(io::ErrorKind::NotADirectory.into());
            };
            let node = *names.entry(part.clone()).or_insert(made);
            if node == made {
                durable.insert(part, made);
                state.nodes.push(Node::Dir { names: BTreeMap::new(), durable: BTreeMap::new() });
            }
            at = node;
        }
        Ok(())
    }

    fn remove_dir(&self, dir: &Path) -> io::Result<()> {
        let mut state = self.state();
        if let Ok((parent, name)) = state.split(dir) {
            state.names(parent)?.remove(&name);
        }
        Ok(())
    }

    fn open(&self, path: &Path, how: Open) -> io::Result<Box<dyn File>> {
        let mut state = self.state();
        if how == Open::Create && state.is_faulty(Fault::Create) {
            return Err(injected(Fault::Create));
        }
        let (dir, name) = state.split(path)?;
        let node = match (state.names(dir)?.get(&name).copied(), how) {
            (Some(node), _) => node,
            (None, Open::Existing) => return Err(io::ErrorKind::NotFound.into()),
            (None, Open::Create) => {
                let node = state.nodes.len();
                state.nodes.push(Node::File(Content::default()));
                state.names(dir)?.insert(name, node);
                node
            }
        };
        match &mut state.nodes[node] {
            Node::File(content) if how == Open::Create => content.set_size(0),
            Node::File(_) => {}
            Node::Dir { .. } => return Err(io::ErrorKind::IsADirectory.into()),
        }
        state.handle_count += 1;
        Ok(Box::new(SimFile { disk: self.clone(), node, epoch: state.epoch, handle: state.handle_count }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.state();
        if state.is_faulty(Fault::Rename) {
            return Err(injected(Fault::Rename));
        }
        let (from_dir, from_name) = state.split(from)?;
        let (to_dir, to_name) = state.split(to)?;
        if let Some(&target) = state.names(to_dir)?.get(&to_name)
            && let Node::Dir { names, .. } = &state.nodes[target]
            && !names.is_empty()
        {
            return Err(io::ErrorKind::DirectoryNotEmpty.into());
        }
        let node = state.names(from_dir)?.remove(&from_name).ok_or(io::ErrorKind::NotFound)?;
        state.names(to_dir)?.insert(to_name, node);
        Ok(())
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        let (dir, name) = state.split(path)?;
        state.names(dir)?.remove(&name).map(|_| ()).ok_or(io::ErrorKind::NotFound.into())
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let mut state = self.state();
        if state.is_faulty(Fault::Sync) {
            return Err(injected(Fault::Sync));
        }
        let dir = state.find(dir)?;
        match &mut state.nodes[dir] {
            Node::Dir { names, durable } => {
                durable.clone_from(names);
                Ok(())
            }
            Node::File(_) => Err(io::ErrorKind::NotADirectory.into()),
        }
    }
}

struct SimFile {
    disk: SimDisk,
    node: usize,
    epoch: u64,
    handle: u64,
}

impl SimFile {
    fn with<T>(&self, work: impl FnOnce(&mut Content, u64) -> T) -> io::Result<T> {
        let mut state = self.disk.state();
        if state.epoch != self.epoch {
            return Err(io::Error::other("the machine has crashed since the file was opened"));
        }
        match &mut state.nodes[self.node] {
            Node::File(content) => Ok(work(content, self.handle)),
            Node::Dir { .. } => unreachable!("only files are opened"),
        }
    }

    /// Takes room for growing to `size`; answers what of it there was not.
    fn take_room(&self, size: u64) -> io::Result<u64> {
        let growth = size.saturating_sub(self.size()?);
        let mut state = self.disk.state();
        let Some(room) = &mut state.room else { return Ok(0) };
        let taken = growth.min(*room);
        *room -= taken;
        Ok(growth - taken)
    }

    fn is_faulty(&self, fault: Fault) -> bool {
        self.disk.state().is_faulty(fault)
    }
}

impl File for SimFile {
    fn size(&self) -> io::Result<u64> {
        self.with(|content, _| content.bytes.len() as u64)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.with(|content, _| {
            let from = (offset as usize).min(content.bytes.len());
            let count = buffer.len().min(content.bytes.len() - from);
            buffer[..count].copy_from_slice(&content.bytes[from..from + count]);
            count
        })
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<Duration> {
        self.disk.state().write_count += 1;
        let mut count = bytes.len();
        let mut result = Ok(Duration::ZERO);
        let missing = self.take_room(offset + count as u64)? as usize;
        if missing > 0 {
            mark("a write found no room");
            count = count.saturating_sub(missing);
            result = Err(io::ErrorKind::StorageFull.into());
        } else if self.is_faulty(Fault::Write) {
            let end = (offset as usize + count / 2) / SECTOR * SECTOR;
            count = end.saturating_sub(offset as usize);
            result = Err(injected(Fault::Write));
        }
        self.with(|content, _| content.write(offset as usize, &bytes[..count]))?;
        result
    }

    fn set_size(&mut self, size: u64) -> io::Result<()> {
        self.with(|content, _| content.set_size(size as usize))
    }

    fn reserve(&mut self, size: u64) -> io::Result<bool> {
        let before = self.size()?;
        if before >= size {
            return Ok(true);
        }
        if self.disk.state().room.is_some_and(|room| room < size - before) {
            return Ok(false);
        }
        self.take_room(size)?;
        self.set_size(size)?;
        Ok(true)
    }

    fn sync(&mut self) -> io::Result<Duration> {
        self.disk.state().sync_count += 1;
        if self.is_faulty(Fault::Sync) {
            self.with(|content, _| {
                content.dirty.clear();
                content.bytes = content.durable.clone();
            })?;
            return Err(injected(Fault::Sync));
        }
        self.with(|content, _| content.sync())?;
        Ok(Duration::ZERO)
    }

    fn try_lock(&mut self) -> io::Result<bool> {
        self.with(|content, handle| *content.locked_by.get_or_insert(handle) == handle)
    }
}

impl Drop for SimFile {
    fn drop(&mut self) {
        // An error means that a crash has already taken the lock away.
        let _ = self.with(|content, handle| {
            if content.locked_by == Some(handle) {
                content.locked_by = None;
            }
        });
    }
}

/// Passes everything on to another disk and notes up to where each file was written when it was last synced, so that
/// a test can take away what a power loss could have taken.
#[derive(Clone)]
pub struct RecordingDisk {
    inner: Arc<dyn Disk>,
    /// By the present names. An open file shares its note, because it may be renamed meanwhile.
    notes: Arc<Mutex<BTreeMap<PathBuf, Arc<Mutex<Note>>>>>,
}

/// What is known of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Note {
    /// Where the last written byte ended.
    pub written: u64,
    /// The same when the file was last synced.
    pub synced: u64,
}

impl RecordingDisk {
    pub fn new(inner: Arc<dyn Disk>) -> RecordingDisk {
        RecordingDisk { inner, notes: Arc::default() }
    }

    /// What was noted, by the present names of the files.
    pub fn notes(&self) -> BTreeMap<PathBuf, Note> {
        self.lock().iter().map(|(path, note)| (path.clone(), *lock(note))).collect()
    }

    /// Cuts every file back to what was synced. No file may be open.
    pub fn cut_to_synced(&self) -> io::Result<()> {
        for (path, note) in self.lock().iter() {
            let mut note = lock(note);
            self.inner.open(path, Open::Existing)?.set_size(note.synced)?;
            note.written = note.synced;
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<PathBuf, Arc<Mutex<Note>>>> {
        lock(&self.notes)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no holder of the lock panics")
}

impl Disk for RecordingDisk {
    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        self.inner.list(dir)
    }

    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        self.inner.create_dir(dir)
    }

    fn remove_dir(&self, dir: &Path) -> io::Result<()> {
        self.inner.remove_dir(dir)?;
        self.lock().retain(|path, _| !path.starts_with(dir));
        Ok(())
    }

    fn open(&self, path: &Path, how: Open) -> io::Result<Box<dyn File>> {
        let file = self.inner.open(path, how)?;
        let size = file.size()?;
        // What is there when it is first opened counts as synced.
        let whole = Note { written: size, synced: size };
        let note = self.lock().entry(path.to_owned()).or_insert_with(|| Arc::new(Mutex::new(whole))).clone();
        if how == Open::Create {
            *lock(&note) = whole;
        }
        Ok(Box::new(RecordingFile { file, note }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.inner.rename(from, to)?;
        let mut notes = self.lock();
        let moved: Vec<PathBuf> = notes.keys().filter(|path| path.starts_with(from)).cloned().collect();
        for path in moved {
            let rest = path.strip_prefix(from).expect("it was chosen by this prefix");
            let target = if rest.as_os_str().is_empty() { to.to_owned() } else { to.join(rest) };
            let note = notes.remove(&path).expect("it was just listed");
            notes.insert(target, note);
        }
        Ok(())
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.inner.remove_file(path)?;
        self.lock().remove(path);
        Ok(())
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.inner.sync_dir(dir)
    }
}

struct RecordingFile {
    file: Box<dyn File>,
    note: Arc<Mutex<Note>>,
}

impl File for RecordingFile {
    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.file.read_at(offset, buffer)
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<Duration> {
        let took = self.file.write_at(offset, bytes)?;
        let mut note = lock(&self.note);
        note.written = note.written.max(offset + bytes.len() as u64);
        Ok(took)
    }

    fn set_size(&mut self, size: u64) -> io::Result<()> {
        self.file.set_size(size)?;
        let mut note = lock(&self.note);
        note.written = note.written.min(size);
        Ok(())
    }

    fn reserve(&mut self, size: u64) -> io::Result<bool> {
        self.file.reserve(size)
    }

    fn sync(&mut self) -> io::Result<Duration> {
        let took = self.file.sync()?;
        let mut note = lock(&self.note);
        note.synced = note.written;
        Ok(took)
    }

    fn try_lock(&mut self) -> io::Result<bool> {
        self.file.try_lock()
    }
}
