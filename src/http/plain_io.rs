//! A connection's socket as the HTTP layers see it.
//!
//! It offers no vectored writes: with them the HTTP/2 layer hands each small frame to the kernel as it is; without, it
//! joins them into one buffer first. For answers of a few hundred bytes the copy is much cheaper than the longer system
//! call. And it ends for a client that pings too often.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Instant,
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::pings::Pings;

pub struct PlainIo<S> {
    socket: S,
    pings: Pings,
    is_over: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> PlainIo<S> {
    pub fn new(socket: S, pings: Pings) -> Self {
        Self { socket, pings, is_over: false }
    }

    /// Nothing more is read. If the client does not take the last words at once, it goes without.
    fn say_goodbye(&mut self, cx: &mut Context<'_>) {
        self.is_over = true;
        if let Some(goodbye) = self.pings.goodbye() {
            let _ = Pin::new(&mut self.socket).poll_write(cx, &goodbye);
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for PlainIo<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.is_over {
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.socket).poll_read(cx, buf))?;
        if !self.pings.received(&buf.filled()[before..], Instant::now) {
            buf.set_filled(before);
            self.say_goodbye(cx);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for PlainIo<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.is_over {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        let written = ready!(Pin::new(&mut self.socket).poll_write(cx, buf))?;
        self.pings.sent(&buf[..written]);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}
