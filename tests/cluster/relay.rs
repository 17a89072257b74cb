//! The network between members: one listener in front of each member's peer port, with faults per link that can be
//! switched while it runs.
//!
//! Members know each other by these listeners. Who dials is found by the socket's process (`sockets.rs`), so that a cut
//! holds for everything members say to each other: also for what bears no name, as forwarded renewals and questions for
//! versions.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
};

use crate::sockets::{self, Dialler};

/// What happens to bytes from one member to another.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    /// Nothing arrives; connections stay open and silent.
    pub cut: bool,
    pub delay: Duration,
    /// Chance that a piece of data ends its connection instead.
    pub reset: f64,
}

const FINE: Link = Link { cut: false, delay: Duration::ZERO, reset: 0.0 };

#[derive(Clone, Default)]
pub struct Network(Arc<Mutex<Inner>>);

#[derive(Default)]
struct Inner {
    /// By who sends and who receives.
    links: HashMap<(u64, u64), watch::Sender<Link>>,
    /// The newest process of each member.
    processes: HashMap<u64, u32>,
}

impl Network {
    fn sender(&self, from: u64, to: u64) -> watch::Sender<Link> {
        let mut inner = self.0.lock().unwrap();
        inner.links.entry((from, to)).or_insert_with(|| watch::Sender::new(FINE)).clone()
    }

    /// The member runs as this process now.
    pub fn runs_as(&self, member: u64, process: u32) {
        self.0.lock().unwrap().processes.insert(member, process);
    }

    fn processes(&self) -> HashMap<u64, u32> {
        self.0.lock().unwrap().processes.clone()
    }

    pub fn set(&self, from: u64, to: u64, link: Link) {
        self.sender(from, to).send_replace(link);
    }

    pub fn cut(&self, from: u64, to: u64) {
        self.set(from, to, Link { cut: true, ..FINE });
    }

    /// No bytes between the two sides, either way.
    pub fn split(&self, one: &[u64], other: &[u64]) {
        for a in one {
            for b in other {
                self.cut(*a, *b);
                self.cut(*b, *a);
            }
        }
    }

    pub fn heal(&self) {
        for link in self.0.lock().unwrap().links.values() {
            link.send_replace(FINE);
        }
    }

    /// Passes connections on `listener` to `port`, the peer port of the member `to`.
    pub fn relay(&self, listener: std::net::TcpListener, to: watch::Receiver<u64>, port: u16) {
        let network = self.clone();
        tokio::spawn(async move {
            let listener = TcpListener::from_std(listener).expect("a listener");
            while let Ok((socket, _)) = listener.accept().await {
                let (network, to) = (network.clone(), to.clone());
                tokio::spawn(async move {
                    let _ = network.pass(socket, &to, port).await;
                });
            }
        });
    }

    async fn pass(&self, dialler: TcpStream, to: &watch::Receiver<u64>, port: u16) -> io::Result<()> {
        // A member that does not run is dialled often, and finding out by whom takes time.
        let member = TcpStream::connect(("127.0.0.1", port)).await?;
        let (local, remote) = (dialler.local_addr()?.port(), dialler.peer_addr()?.port());
        let from = match sockets::dialler(remote, local, &self.processes()) {
            Dialler::Member(from) => Some(from),
            // Tests speak to members this way, too.
            Dialler::Other => None,
            Dialler::Gone => return Ok(()),
        };
        for socket in [&dialler, &member] {
            socket.set_nodelay(true)?;
        }
        let to = *to.borrow();
        let (out, back) = match from {
            Some(from) => (self.sender(from, to), self.sender(to, from)),
            None => (watch::Sender::new(FINE), watch::Sender::new(FINE)),
        };
        let (dialler_read, dialler_write) = dialler.into_split();
        let (member_read, member_write) = member.into_split();
        tokio::select! {
            done = pump(dialler_read, member_write, out.subscribe()) => done,
            done = pump(member_read, dialler_write, back.subscribe()) => done,
        }
    }
}

/// Waits for the link to carry data. False: it was cut meanwhile, so the connection is broken.
async fn wait(link: &mut watch::Receiver<Link>, rng: &mut StdRng) -> bool {
    let now = *link.borrow_and_update();
    if now.cut {
        // Silent until the link is back; what was under way is lost, and with it the connection.
        let _ = link.wait_for(|link| !link.cut).await;
        return false;
    }
    if !now.delay.is_zero() {
        tokio::time::sleep(now.delay).await;
    }
    now.reset == 0.0 || !rng.random_bool(now.reset)
}

async fn pump(
    mut read: tokio::net::tcp::OwnedReadHalf,
    mut write: tokio::net::tcp::OwnedWriteHalf,
    mut link: watch::Receiver<Link>,
) -> io::Result<()> {
    // Differs between connections; which bytes are hit hangs on the clock anyway.
    let mut rng = StdRng::seed_from_u64(read.peer_addr().map_or(0, |address| u64::from(address.port())));
    let mut buffer = vec![0; 64 << 10];
    loop {
        let n = read.read(&mut buffer).await?;
        if n == 0 || !wait(&mut link, &mut rng).await {
            return Ok(());
        }
        write.write_all(&buffer[..n]).await?;
    }
}
