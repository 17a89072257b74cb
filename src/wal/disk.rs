//! The seam between the log and the disk.
//!
//! [`Disk`] and [`File`] are what the log needs of a file system, no more. [`RealDisk`] is the machine's;
//! [`sim::SimDisk`](super::sim::SimDisk) is a disk in memory that can lose what was not synced. Writes and syncs answer
//! how long they took, so that the log itself reads no clock.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt},
    path::Path,
    time::Duration,
};

/// How [`Disk::open`] opens a file. Both ways give a file that can be read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Open {
    /// The file must exist.
    Existing,
    /// The file is made, or emptied if it exists.
    Create,
}

/// A directory tree.
pub trait Disk: Send + Sync {
    /// Names in the directory, in no order.
    fn list(&self, dir: &Path) -> io::Result<Vec<String>>;

    /// Makes the directory and those missing above it, for the owner only and durably.
    fn create_dir(&self, dir: &Path) -> io::Result<()>;

    /// Removes the directory and all it holds; no error if there is none.
    fn remove_dir(&self, dir: &Path) -> io::Result<()>;

    fn open(&self, path: &Path, how: Open) -> io::Result<Box<dyn File>>;

    /// Renames a file, or a directory onto nothing or an empty one.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    fn remove_file(&self, path: &Path) -> io::Result<()>;

    /// When it returns, the names in the directory survive power loss.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
}

/// An open file. Dropping it gives its lock up.
pub trait File: Send {
    fn size(&self) -> io::Result<u64>;

    /// Reads until the buffer or the file is at its end; answers how much was read.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize>;

    /// Writes all of the bytes.
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<Duration>;

    fn set_size(&mut self, size: u64) -> io::Result<()>;

    /// Grows the file with zeros to at least `size` and reserves the blocks, so that a later sync has no metadata to
    /// write. False if there is no room for it; the file is then as it was.
    fn reserve(&mut self, size: u64) -> io::Result<bool>;

    /// When it returns, the content and size of the file survive power loss.
    fn sync(&mut self) -> io::Result<Duration>;

    /// Takes the exclusive lock of the whole file without waiting; false if another has it.
    fn try_lock(&mut self) -> io::Result<bool>;
}

/// The machine's file system.
#[derive(Clone, Copy, Debug, Default)]
pub struct RealDisk;

impl Disk for RealDisk {
    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(dir)? {
            // No name of ours is beyond UTF-8; others are ignored as unknown names are.
            if let Ok(name) = entry?.file_name().into_string() {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        let parent = match dir.parent() {
            None => return Ok(()),
            Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
            Some(parent) => parent,
        };
        if !parent.exists() {
            self.create_dir(parent)?;
        }
        match fs::DirBuilder::new().mode(0o700).create(dir) {
            Ok(()) => self.sync_dir(parent),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn remove_dir(&self, dir: &Path) -> io::Result<()> {
        match fs::remove_dir_all(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    fn open(&self, path: &Path, how: Open) -> io::Result<Box<dyn File>> {
        let create = how == Open::Create;
        let file =
            fs::OpenOptions::new().read(true).write(true).create(create).truncate(create).mode(0o600).open(path)?;
        Ok(Box::new(RealFile(file)))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        fs::File::open(dir)?.sync_all()
    }
}

struct RealFile(fs::File);

impl File for RealFile {
    fn size(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let mut done = 0;
        while done < buffer.len() {
            match self.0.read_at(&mut buffer[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<Duration> {
        timed(|| self.0.write_all_at(bytes, offset))
    }

    fn set_size(&mut self, size: u64) -> io::Result<()> {
        self.0.set_len(size)
    }

    fn reserve(&mut self, size: u64) -> io::Result<bool> {
        use rustix::{fs::FallocateFlags, io::Errno};
        let before = self.size()?;
        if before >= size {
            return Ok(true);
        }
        match rustix::fs::fallocate(&self.0, FallocateFlags::empty(), 0, size) {
            Ok(()) => Ok(true),
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => self.0.set_len(size).map(|()| true),
            Err(Errno::NOSPC | Errno::DQUOT | Errno::FBIG) => {
                // Blocks taken before space ran out are given back.
                self.0.set_len(before)?;
                Ok(false)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn sync(&mut self) -> io::Result<Duration> {
        // fdatasync: it covers the size, and leaves the times alone.
        timed(|| self.0.sync_data())
    }

    fn try_lock(&mut self) -> io::Result<bool> {
        try_lock(&self.0)
    }
}

/// etcd and its tools take this kind of lock, so it is the one that keeps them and us apart.
#[cfg(target_os = "linux")]
fn try_lock(file: &fs::File) -> io::Result<bool> {
    use std::os::fd::AsRawFd;

    let whole_file = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open for as long as `file` is borrowed, and this command only reads the `flock`
    // structure behind the pointer, which outlives the call.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const whole_file) };
    if result == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(false),
        // The kernel or file system has no such lock.
        Some(libc::EINVAL | libc::ENOSYS) => try_flock(file),
        _ => Err(error),
    }
}

#[cfg(not(target_os = "linux"))]
fn try_lock(file: &fs::File) -> io::Result<bool> {
    try_flock(file)
}

fn try_flock(file: &fs::File) -> io::Result<bool> {
    match rustix::fs::flock(file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[allow(clippy::disallowed_methods, reason = "the clock of the log is behind this seam")]
fn timed(work: impl FnOnce() -> io::Result<()>) -> io::Result<Duration> {
    let start = std::time::Instant::now();
    work()?;
    Ok(start.elapsed())
}
