//! A proxy in front of the server, as an administrator puts one there: it can refuse and cut.

use std::{
    io::{ErrorKind, Read, Write},
    net::{Ipv4Addr, Shutdown, TcpListener, TcpStream},
    sync::{Arc, Mutex, MutexGuard},
    thread,
    time::Instant,
};

/// Forwards connections to a port. Its threads end with the test.
pub(crate) struct Front {
    port: u16,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    refusal: Option<&'static str>,
    refused: Vec<Instant>,
    open: Vec<TcpStream>,
}

impl Front {
    pub(crate) fn before(target: u16) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = Arc::new(Mutex::new(State::default()));
        let theirs = Arc::clone(&state);
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let state = Arc::clone(&theirs);
                thread::spawn(move || serve(client, target, &state));
            }
        });
        Self { port, state }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}/", self.port)
    }

    /// From now on this is the answer to every request.
    pub(crate) fn refuse(&self, answer: &'static str) {
        self.lock().refusal = Some(answer);
    }

    pub(crate) fn allow(&self) {
        self.lock().refusal = None;
    }

    /// When requests were refused.
    pub(crate) fn refused(&self) -> Vec<Instant> {
        self.lock().refused.clone()
    }

    /// Ends every connection.
    pub(crate) fn cut(&self) {
        for stream in self.lock().open.drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

fn serve(mut client: TcpStream, target: u16, state: &Mutex<State>) {
    let refusal = {
        let mut state = state.lock().unwrap();
        if state.refusal.is_some() {
            state.refused.push(Instant::now());
        } else {
            state.open.push(client.try_clone().unwrap());
        }
        state.refusal
    };
    if let Some(answer) = refusal {
        let mut request = Vec::new();
        let mut chunk = [0; 4096];
        while !request.windows(4).any(|end| end == b"\r\n\r\n") {
            match client.read(&mut chunk) {
                Ok(0) | Err(_) => return,
                Ok(length) => request.extend_from_slice(&chunk[..length]),
            }
        }
        let _ = client.write_all(answer.as_bytes());
        return;
    }
    let server = TcpStream::connect((Ipv4Addr::LOCALHOST, target)).unwrap();
    let (from, to) = (server.try_clone().unwrap(), client.try_clone().unwrap());
    let back = thread::spawn(move || copy(from, to));
    copy(client, server);
    let _ = back.join();
}

fn copy(mut from: TcpStream, mut to: TcpStream) {
    let mut chunk = [0; 16 * 1024];
    loop {
        match from.read(&mut chunk) {
            Ok(0) => break,
            Ok(length) if to.write_all(&chunk[..length]).is_err() => break,
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}
