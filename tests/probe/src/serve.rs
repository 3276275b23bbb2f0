//! A web server, for the demonstration and for looking inside a running task.

use crate::inspect;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::Duration;

/// A request is one line that matters.
const MAX_REQUEST_BYTES: u64 = 8_192;

/// Serves until it is ended.
pub fn serve(port: u16, descriptors: &[i32]) {
    let listener = match TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)) {
        Ok(listener) => listener,
        Err(error) => {
            eprintln!("could not listen on port {port}: {error}");
            std::process::exit(1)
        }
    };
    // As process 1 of a namespace, SIGTERM ends only a program that asks for it.
    // SAFETY: `end` only calls _exit, which is async-signal-safe.
    unsafe { libc::signal(libc::SIGTERM, end as *const () as libc::sighandler_t) };
    println!("listening on port {port}");
    for connection in listener.incoming().flatten() {
        let descriptors = descriptors.to_vec();
        std::thread::spawn(move || {
            let _ = answer(connection, &descriptors); // a visitor that left is no concern
        });
    }
}

extern "C" fn end(_: libc::c_int) {
    // SAFETY: `_exit` has no conditions.
    unsafe { libc::_exit(0) }
}

fn answer(mut connection: TcpStream, descriptors: &[i32]) -> std::io::Result<()> {
    connection.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut reader = BufReader::new(connection.try_clone()?.take(MAX_REQUEST_BYTES));
    let mut request = String::new();
    reader.read_line(&mut request)?;
    let mut line = String::new();
    while reader.read_line(&mut line)? > 2 {
        line.clear();
    }
    let path = request.split(' ').nth(1).unwrap_or("/").to_owned();
    println!("GET {path}");
    let (status, kind, body) = match path.as_str() {
        "/" => ("200 OK", "text/plain", greeting()),
        "/health" => ("200 OK", "text/plain", "ok\n".to_owned()),
        "/inspect" => ("200 OK", "application/json", inspect::inspect(descriptors) + "\n"),
        path => match path
            .strip_prefix("/secret/")
            .filter(|name| !name.contains('/') && *name != "..")
        {
            Some(name) => match std::fs::read_to_string(format!("/run/secrets/{name}")) {
                Ok(value) => ("200 OK", "text/plain", value),
                Err(error) => ("404 Not Found", "text/plain", format!("{error}\n")),
            },
            None => ("404 Not Found", "text/plain", "nothing here\n".to_owned()),
        },
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    connection.write_all(head.as_bytes())?;
    connection.write_all(body.as_bytes())
}

fn greeting() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("hello from {}\n", host.trim())
}
