//! The server binary: read the configuration, start the member, wait for a signal, stop.

use std::process::ExitCode;

use actd::{
    config::{self, Loaded},
    server,
    telemetry::logs,
};
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
    actix_rt::System::new().block_on(run(&config, &log))
}

async fn run(config: &config::Config, log: &logs::Guard) -> ExitCode {
    let (Ok(mut interrupt), Ok(mut terminate)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        log.notice(&config::Notice::fatal("cannot listen for signals"));
        return ExitCode::FAILURE;
    };
    // A start may wait for other members; nothing is acknowledged before its end, so it may be left at any point.
    let started = tokio::select! {
        started = server::start(config) => started,
        _ = interrupt.recv() => return ExitCode::from(130),
        _ = terminate.recv() => return ExitCode::from(143),
    };
    let member = match started {
        Ok(member) => member,
        Err(e) => {
            log.notice(&config::Notice::fatal("cannot start the server").with("error", format!("{e:#}")));
            return ExitCode::FAILURE;
        }
    };
    let code = tokio::select! {
        _ = interrupt.recv() => 130,
        _ = terminate.recv() => 143,
        () = member.removed() => {
            log.notice(&config::Notice::warn("this member was removed from its cluster; stopping"));
            // The others' last messages, and answers to who asked for it.
            tokio::time::sleep(std::time::Duration::from_secs(1)).await;
            0
        }
    };
    member.stop().await;
    // What a shell sees of a process that its signal ended; 0 for the first process of a container.
    if std::process::id() == 1 { ExitCode::SUCCESS } else { ExitCode::from(code) }
}
