//! Tests of the connections: bytes without sockets, then transports over real sockets on loopback.

mod codec;
mod live;
mod refusals;
mod support;
