use super::*;
use bulkhead_launcher::message::{ExitCause, ExitRecord, Limits, RefusalCode, SecretFile, TaskState};
use std::io::Read;

/// The launcher's end, answered by hand.
pub(crate) struct Far(AsyncFd<Socket>);

impl Far {
    pub(crate) async fn next(&self) -> (Envelope, Vec<OwnedFd>) {
        loop {
            let mut ready = self.0.readable().await.expect("readable");
            if let Ok(received) = ready.try_io(|socket| socket.get_ref().0.receive::<Envelope>()) {
                return received.expect("a message").expect("open");
            }
        }
    }

    pub(crate) fn reply(&self, id: u64, result: Result<Reply, Refusal>, descriptors: &[OwnedFd]) {
        let beside: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        self.0
            .get_ref()
            .0
            .send(&FromLauncher::Reply { id, result }, &beside)
            .expect("reply");
    }
}

pub(crate) fn connected() -> (
    Runtime,
    Far,
    mpsc::Receiver<Event>,
    tokio::task::JoinHandle<io::Result<()>>,
) {
    let (near, far) = Connection::pair().expect("pair");
    let (runtime, driver, events) = client(near).expect("client");
    let far = Far(register(far).expect("far end"));
    (runtime, far, events, tokio::spawn(driver.run()))
}

fn task(name: &str) -> TaskId {
    TaskId::try_from(name.to_owned()).expect("id")
}

fn spec(argument: &str) -> TaskSpec {
    TaskSpec {
        task: task("web"),
        epoch: 1,
        layers: vec![],
        argv: vec![argument.into()],
        env: vec![],
        user: String::new(),
        workdir: String::new(),
        hostname: "web".into(),
        tmpfs: vec![],
        limits: Limits::default(),
        secrets: vec![
            SecretFile {
                name: "a".into(),
                size: 3,
            },
            SecretFile {
                name: "b".into(),
                size: 2,
            },
        ],
        stop_grace_ms: 1,
    }
}

#[tokio::test]
async fn answers_find_their_requests_in_any_order() {
    let (runtime, far, _events, _driver) = connected();
    let (first, second, ()) = tokio::join!(
        runtime.remove(task("a")),
        runtime.signal(task("b"), TaskSignal::Kill),
        async {
            let (one, _) = far.next().await;
            let (two, _) = far.next().await;
            far.reply(
                two.id,
                Err(Refusal::new(RefusalCode::UnknownTask, "no task b")),
                &[],
            );
            far.reply(one.id, Ok(Reply::Done), &[]);
        }
    );
    first.expect("the removal");
    assert_eq!(second.expect_err("the signal").to_string(), "no task b");
}

#[tokio::test]
async fn secrets_go_over_their_own_socket() {
    let (runtime, far, _events, _driver) = connected();
    let status = TaskStatus {
        task: task("web"),
        epoch: 1,
        pid: 9,
        started_at_ms: 0,
        state: TaskState::Running,
    };
    let answer = status.clone();
    let (started, ()) = tokio::join!(runtime.start(spec("/web"), &[b"one", b"2!"]), async {
        let (envelope, mut descriptors) = far.next().await;
        let shown = serde_json::to_string(&envelope).expect("text");
        assert!(!shown.contains("one"), "no value is in the message");
        let stream = descriptors.pop().expect("the stream");
        let values = tokio::task::spawn_blocking(move || {
            let mut values = String::new();
            std::os::unix::net::UnixStream::from(stream)
                .read_to_string(&mut values)
                .map(|_| values)
        });
        assert_eq!(values.await.expect("reader").expect("values"), "one2!");
        far.reply(envelope.id, Ok(Reply::Started(answer)), &[]);
    });
    assert_eq!(started.expect("started"), status);
}

#[tokio::test]
async fn a_refused_start_tells_the_refusal_even_when_secrets_do_not_fit_the_socket() {
    let (runtime, far, _events, _driver) = connected();
    let large = vec![0; 4 << 20];
    let secrets = [large.as_slice()];
    let (started, ()) = tokio::join!(runtime.start(spec("/web"), &secrets), async {
        let (envelope, descriptors) = far.next().await;
        drop(descriptors);
        far.reply(
            envelope.id,
            Err(Refusal::new(RefusalCode::TaskExists, "it exists")),
            &[],
        );
    });
    assert!(
        matches!(started, Err(RuntimeError::Refused(refusal)) if refusal.code == RefusalCode::TaskExists)
    );
}

#[tokio::test]
async fn a_request_that_is_too_large_fails_alone() {
    let (runtime, far, _events, _driver) = connected();
    let error = runtime
        .start(spec(&"x".repeat(200 << 10)), &[])
        .await
        .expect_err("too large");
    assert!(matches!(error, RuntimeError::Refused(refusal) if refusal.code == RefusalCode::Invalid));
    let (removed, ()) = tokio::join!(runtime.remove(task("a")), async {
        let (envelope, _) = far.next().await;
        far.reply(envelope.id, Ok(Reply::Done), &[]);
    });
    removed.expect("the next request works");
}

#[tokio::test]
async fn a_list_is_read_to_its_last_page() {
    let (runtime, far, _events, _driver) = connected();
    let status = |name: &str| TaskStatus {
        task: task(name),
        epoch: 1,
        pid: 1,
        started_at_ms: 0,
        state: TaskState::Running,
    };
    let (tasks, ()) = tokio::join!(runtime.tasks(), async {
        let (envelope, _) = far.next().await;
        assert_eq!(envelope.request, Request::List { after: None });
        far.reply(
            envelope.id,
            Ok(Reply::Tasks {
                tasks: vec![status("a")],
                more: true,
            }),
            &[],
        );
        let (envelope, _) = far.next().await;
        assert_eq!(
            envelope.request,
            Request::List {
                after: Some(task("a"))
            }
        );
        far.reply(
            envelope.id,
            Ok(Reply::Tasks {
                tasks: vec![status("b")],
                more: false,
            }),
            &[],
        );
    });
    let names: Vec<_> = tasks
        .expect("tasks")
        .into_iter()
        .map(|status| status.task)
        .collect();
    assert_eq!(names, [task("a"), task("b")]);
}

#[tokio::test]
async fn an_answer_of_another_kind_is_an_error() {
    let (runtime, far, _events, _driver) = connected();
    let (socket, ()) = tokio::join!(runtime.socket(task("a")), async {
        let (envelope, _) = far.next().await;
        far.reply(envelope.id, Ok(Reply::Sockets), &[]); // without the descriptor
    });
    assert!(matches!(
        socket,
        Err(RuntimeError::Unfitting { request: "Sockets" })
    ));
}

#[tokio::test]
async fn events_arrive_and_the_end_fails_what_is_open() {
    let (runtime, far, mut events, driver) = connected();
    let exit = ExitRecord {
        cause: ExitCause::Code(0),
        out_of_memory: false,
        ended_at_ms: 1,
        message: String::new(),
    };
    let event = Event::Exited {
        task: task("a"),
        epoch: 1,
        exit,
    };
    far.0
        .get_ref()
        .0
        .send(&FromLauncher::Event(event.clone()), &[])
        .expect("event");
    assert_eq!(events.recv().await, Some(event));
    let (probed, ()) = tokio::join!(runtime.probe(), async {
        far.next().await;
        drop(far);
    });
    assert!(matches!(probed, Err(RuntimeError::Closed)));
    driver.await.expect("driver").expect("a clean end");
}
