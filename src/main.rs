//! The server binary: read the configuration, start the member, wait for a signal, stop.

use std::process::ExitCode;

use actd::{
    config::{self, Loaded},
    server,
    telemetry::logs,
};
use rustix::process::Signal;
use tokio::signal::unix::{SignalKind, signal};

fn main() -> ExitCode {
    let loaded = config::load(std::env::args().skip(1), std::env::vars(), |path| std::fs::read_to_string(path));
    let (config, notices) = match loaded {
        Ok(Loaded::Run(config, notices)) => (config, notices),
        Ok(Loaded::Print { stdout, stderr, code }) => {
            print!("{stdout}");
            eprint!("{stderr}");
            return ExitCode::from(code as u8);
        }
        Err(exit) => {
            eprint!("{}", exit.stderr);
            logs::print(&exit.notices);
            return ExitCode::from(exit.code as u8);
        }
    };
    let log = match logs::init(&config) {
        Ok(log) => log,
        Err(e) => {
            eprintln!("cannot start logging: {e}");
            return ExitCode::FAILURE;
        }
    };
    log.report_panics();
    for notice in &notices {
        log.notice(notice);
    }
    // The system carries the arbiters that the actors run on; its own thread runs the timers.
    let end = actix_rt::System::new().block_on(run(&config, &log));
    drop(log);
    match end {
        End::Exit(code) => code,
        End::Signal(signal) => die_of(signal),
    }
}

/// How a process ends.
enum End {
    Exit(ExitCode),
    /// By the signal that stopped it, so that its parent sees what happened.
    Signal(Signal),
}

/// Ends the process by `signal`, as if nobody had caught it.
fn die_of(signal: Signal) -> ExitCode {
    // The kernel does not let the first process of a container die of a signal.
    if std::process::id() == 1 {
        return ExitCode::SUCCESS;
    }
    // SAFETY: a system call with a signal's number and its default action, without memory of ours.
    unsafe { libc::signal(signal.as_raw(), libc::SIG_DFL) };
    let _ = rustix::process::kill_process(rustix::process::getpid(), signal);
    // Unless somebody has blocked it, the signal comes before this.
    ExitCode::from(128 + signal.as_raw() as u8)
}

async fn run(config: &config::Config, log: &logs::Guard) -> End {
    let (Ok(mut interrupt), Ok(mut terminate)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        log.notice(&config::Notice::fatal("cannot listen for signals"));
        return End::Exit(ExitCode::FAILURE);
    };
    // A start may wait for other members; nothing is acknowledged before its end, so it may be left at any point.
    let started = tokio::select! {
        started = server::start(config) => started,
        _ = interrupt.recv() => return End::Signal(Signal::INT),
        _ = terminate.recv() => return End::Signal(Signal::TERM),
    };
    let member = match started {
        Ok(member) => member,
        Err(e) if e.is::<server::Removed>() => {
            say_removed(log);
            return End::Exit(ExitCode::SUCCESS);
        }
        Err(e) => {
            log.notice(&config::Notice::fatal("cannot start the server").with("error", format!("{e:#}")));
            return End::Exit(ExitCode::FAILURE);
        }
    };
    let end = tokio::select! {
        _ = interrupt.recv() => End::Signal(Signal::INT),
        _ = terminate.recv() => End::Signal(Signal::TERM),
        () = member.removed() => {
            say_removed(log);
            // The others' last messages, and answers to who asked for it.
            tokio::time::sleep(std::time::Duration::from_secs(1)).await;
            End::Exit(ExitCode::SUCCESS)
        }
    };
    member.stop().await;
    end
}

fn say_removed(log: &logs::Guard) {
    log.notice(&config::Notice::warn("server error").with("error", server::Removed.to_string()));
    log.notice(&config::Notice::warn("data-dir used by this member must be removed"));
}
