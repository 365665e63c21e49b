//! The shell: it sees the windows by wlr-foreign-toplevel, as phosh does, and brings them to the front.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    sync::{Arc, Mutex},
    thread,
};

const SEAT: &str = "wl_seat";
const MANAGER: &str = "zwlr_foreign_toplevel_manager_v1";
const POINTERS: &str = "zwlr_virtual_pointer_manager_v1";
const ACTIVATED: u32 = 2;

/// A window.
#[derive(Clone, Debug, Default)]
struct Toplevel {
    id: u32,
    app: String,
    active: bool,
}

/// What is seen, until the compositor ends.
#[derive(Debug, Default)]
struct View {
    windows: Vec<Toplevel>,
    over: bool,
    /// Objects of ours.
    last: u32,
    seat: u32,
    manager: u32,
}

pub(crate) struct Shell {
    stream: UnixStream,
    view: Arc<Mutex<View>>,
}

impl Shell {
    /// Beside a pointer, without which phoc has nothing that could be active.
    pub(crate) fn on(socket: &Path) -> Self {
        let mut stream = UnixStream::connect(socket).unwrap();
        stream.write_all(&message(1, 1, &[2], None, &[])).unwrap();
        let view = Arc::new(Mutex::new(View { last: 2, ..View::default() }));
        let shell = Self { stream: stream.try_clone().unwrap(), view: Arc::clone(&view) };
        thread::spawn(move || {
            let mut said = Vec::new();
            let mut buffer = [0; 4096];
            loop {
                match stream.read(&mut buffer) {
                    Ok(count) if count > 0 => said.extend_from_slice(&buffer[..count]),
                    _ => {
                        *view.lock().unwrap() = View { over: true, ..View::default() };
                        return;
                    }
                }
                while said.len() >= 8 {
                    let length = usize::from(u16::from_ne_bytes([said[6], said[7]]));
                    if said.len() < length {
                        break;
                    }
                    let words = said[..length].chunks(4).map(|word| u32::from_ne_bytes(word.try_into().unwrap()));
                    hear(&mut stream, &mut view.lock().unwrap(), &words.collect::<Vec<_>>(), &said[..length]);
                    said.drain(..length);
                }
            }
        });
        shell
    }

    /// Asks for the app's window to be in front.
    pub(crate) fn activate(&self, app: &str) {
        let view = self.view.lock().unwrap();
        let id = view.windows.iter().find(|window| window.app == app).unwrap().id;
        (&self.stream).write_all(&message(id, 4, &[view.seat], None, &[])).unwrap();
    }

    /// The app in front.
    pub(crate) fn active(&self) -> Option<String> {
        self.view.lock().unwrap().windows.iter().find(|window| window.active).map(|window| window.app.clone())
    }

    pub(crate) fn has(&self, app: &str) -> bool {
        self.view.lock().unwrap().windows.iter().any(|window| window.app == app)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.view.lock().unwrap().windows.is_empty()
    }

    /// Whether the compositor has gone.
    pub(crate) fn is_over(&self) -> bool {
        self.view.lock().unwrap().over
    }
}

fn hear(stream: &mut UnixStream, view: &mut View, words: &[u32], bytes: &[u8]) {
    let (object, opcode) = (words[0], words[1] & 0xffff);
    let text = |at: usize| {
        let length = words[at] as usize;
        String::from_utf8_lossy(&bytes[at * 4 + 4..at * 4 + 3 + length]).into_owned()
    };
    match (object, opcode) {
        (1, 0) => panic!("the compositor complains: {}", text(4)),
        (2, 0) => {
            let interface = text(3);
            if ![SEAT, MANAGER, POINTERS].contains(&&*interface) {
                return;
            }
            view.last += 1;
            let id = view.last;
            stream.write_all(&message(2, 0, &[words[2]], Some(&interface), &[1, id])).unwrap();
            match &*interface {
                SEAT => view.seat = id,
                MANAGER => view.manager = id,
                _ => {
                    view.last += 1;
                    stream.write_all(&message(id, 0, &[0, view.last], None, &[])).unwrap();
                }
            }
        }
        (id, 0) if id == view.manager => view.windows.push(Toplevel { id: words[2], ..Toplevel::default() }),
        _ => {
            let windows = &mut view.windows;
            let Some(at) = windows.iter().position(|window| window.id == object) else { return };
            match opcode {
                1 => windows[at].app = text(2),
                4 => windows[at].active = words[3..].contains(&ACTIVATED),
                6 => {
                    windows.remove(at);
                    stream.write_all(&message(object, 7, &[], None, &[])).unwrap();
                }
                _ => {}
            }
        }
    }
}

/// A request, with these words and this text as arguments.
fn message(object: u32, opcode: u32, before: &[u32], text: Option<&str>, after: &[u32]) -> Vec<u8> {
    let mut arguments: Vec<u8> = before.iter().flat_map(|word| word.to_ne_bytes()).collect();
    if let Some(text) = text {
        arguments.extend(u32::try_from(text.len() + 1).unwrap().to_ne_bytes());
        arguments.extend(text.as_bytes());
        arguments.resize(arguments.len() + (text.len() + 1).next_multiple_of(4) - text.len(), 0);
    }
    arguments.extend(after.iter().flat_map(|word| word.to_ne_bytes()));
    let second = u32::try_from(arguments.len() + 8).unwrap() << 16 | opcode;
    [&object.to_ne_bytes()[..], &second.to_ne_bytes()[..], &arguments].concat()
}
