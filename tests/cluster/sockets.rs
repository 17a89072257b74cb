//! What the kernel tells about connections on loopback: which member's process one belongs to, and what waits in it unread.

use std::{collections::HashMap, fs};

pub enum Dialler {
    Member(u64),
    /// A process that is no member.
    Other,
    /// The connection is closed on its side.
    Gone,
}

/// One connection as one of its two ends sees it.
struct Row {
    local_port: u16,
    remote: (u32, u16),
    unread: u64,
    inode: u64,
}

/// All IPv4 connections of this machine.
fn rows() -> Vec<Row> {
    let table = fs::read_to_string("/proc/net/tcp").expect("Linux tells its connections");
    table.lines().skip(1).filter_map(row).collect()
}

/// `sl local_address rem_address st tx_queue:rx_queue tr:tm->when retrnsmt uid timeout inode ...`, numbers in hex but the last.
fn row(line: &str) -> Option<Row> {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    let address = |text: &str| {
        let (ip, port) = text.split_once(':')?;
        // The address's bytes in the order of the machine.
        Some((u32::from_str_radix(ip, 16).ok()?.to_ne_bytes(), u16::from_str_radix(port, 16).ok()?))
    };
    let (_, local_port) = address(fields.get(1)?)?;
    let (remote, remote_port) = address(fields.get(2)?)?;
    let (_, unread) = fields.get(4)?.split_once(':')?;
    Some(Row {
        local_port,
        remote: (u32::from_be_bytes(remote), remote_port),
        unread: u64::from_str_radix(unread, 16).ok()?,
        inode: fields.get(9)?.parse().ok()?,
    })
}

/// Who holds the end at `port` of a connection to `to`. `processes`: by member.
pub fn dialler(port: u16, to: u16, processes: &HashMap<u64, u32>) -> Dialler {
    let ends = rows();
    let end = ends.iter().find(|row| row.local_port == port && row.remote.1 == to && row.inode != 0);
    let Some(end) = end else { return Dialler::Gone };
    let wanted = format!("socket:[{}]", end.inode);
    let holds = |process: &u32| {
        let Ok(open) = fs::read_dir(format!("/proc/{process}/fd")) else { return false };
        open.flatten().any(|file| fs::read_link(file.path()).is_ok_and(|target| target.as_os_str() == wanted.as_str()))
    };
    match processes.iter().find(|(_, process)| holds(process)) {
        Some((member, _)) => Dialler::Member(*member),
        None => Dialler::Other,
    }
}

/// For each connection from `address` that a server has at `port`: how many bytes it has not read.
pub fn unread(port: u16, address: std::net::Ipv4Addr) -> Vec<u64> {
    let is_its = |row: &Row| row.local_port == port && row.remote.0 == address.to_bits();
    // What is closed on both sides stays in the table for a minute, and is nobody's.
    rows().into_iter().filter(|row| is_its(row) && row.inode != 0).map(|row| row.unread).collect()
}
