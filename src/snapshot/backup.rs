//! A backup: the database file in pieces, and behind it the SHA-256 of it all.

use bytes::Bytes;
use sha2::{Digest, Sha256};

use super::{Error, bbolt::Source, export::Export};
use crate::storage::Storage;

/// Bytes of the digest at the end. Pages are multiples of 512, so the length says whether there is one.
const DIGEST: u64 = 32;
const SECTOR: u64 = 512;

/// What one message of the stream carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    pub blob: Bytes,
    /// Of the file, the digest not counted.
    pub remaining_bytes: u64,
    pub version: String,
}

/// Where parts go.
pub trait Receiver {
    /// Somebody still waits.
    fn is_there(&self) -> bool;

    /// Waits until there is room; false if nobody waits any more.
    fn take(&mut self, part: Part) -> bool;
}

/// Sends the state as it stands now. Long, and waits for the receiver: for a thread of its own. The engine's old rows
/// are held until it returns.
pub fn send(storage: &dyn Storage, to: &mut dyn Receiver) -> Result<(), Error> {
    let export = Export::take(storage)?;
    let version = export.version();
    let layout = export.measure(&mut || to.is_there())?;
    let mut digest = Sha256::new();
    let mut remaining_bytes = layout.bytes();
    let mut send = |blob: Bytes, remaining_bytes| {
        if to.take(Part { blob, remaining_bytes, version: version.clone() }) { Ok(()) } else { Err(Error::Gone) }
    };
    export.send(&layout, &mut |blob| {
        digest.update(&blob);
        remaining_bytes -= blob.len() as u64;
        send(blob, remaining_bytes)
    })?;
    // Before the last wait.
    drop(export);
    send(Bytes::copy_from_slice(&digest.finalize()), 0)
}

/// Checks the digest behind a backup; false if the file has none.
pub fn verify(file: &dyn Source) -> Result<bool, Error> {
    let len = file.size()?;
    if len % SECTOR != DIGEST {
        return Ok(false);
    }
    let content = len - DIGEST;
    let mut digest = Sha256::new();
    let mut buffer = vec![0; 64 << 10];
    let mut at = 0;
    while at < content {
        let piece = (content - at).min(buffer.len() as u64) as usize;
        file.read_exact_at(&mut buffer[..piece], at)?;
        digest.update(&buffer[..piece]);
        at += piece as u64;
    }
    let mut expected = [0; DIGEST as usize];
    file.read_exact_at(&mut expected, content)?;
    if digest.finalize()[..] != expected {
        return Err(Error::Damaged("its content is not what its SHA-256 says".to_owned()));
    }
    Ok(true)
}
