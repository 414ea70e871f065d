// The types of client.js. docs/client-js.md is its guide.

/** What may be said about the client, and about each of its questions. */
export interface ClientOptions {
  /**
   * A client key, for a server that wants one; or a function that returns a key or a token, which is asked at each connect,
   * and once more after a 401. A key in the source of a page is public.
   */
  key?: string | (() => string | Promise<string>);
  /** Send cookies to a server of another origin: the session that `POST /session` gave. On its own origin they are always sent. */
  session?: boolean;
  /** Absent: a WebSocket, and server-sent events where no WebSocket opens while the server answers over HTTP. */
  transport?: "websocket" | "sse";
  /** Seconds that a whole answer may take, waits and reconnections included. 300 if absent; `Infinity`: no deadline. */
  deadline?: number;
  /** It is awaited before each connection. It may set `endpoints`; if it throws, the connection counts as lost. */
  before?(client: Client): unknown;
  /** It is called with each new state of the connection. */
  onstate?(state: State): void;
}

/** A question beyond its text. */
export interface ChatOptions {
  /** The conversation of a text; absent: one of its own, made from `requestId` if there is one. */
  conversationId?: string;
  /** The provider that alone is asked; absent or null: as the server is configured. */
  provider?: string | null;
  model?: string | null;
  /** Further fields of OpenAI's request, such as `temperature`. */
  options?: Record<string, unknown>;
  /** OpenAI's list of tools. */
  tools?: unknown[];
  metadata?: Record<string, unknown>;
  /** False: the answer comes as one piece. */
  streaming?: boolean;
  /** Seconds, as that of the client; the server ends the answer then, too. */
  deadline?: number;
  /** Seconds after which the server does not begin the answer any more. */
  startWithin?: number;
  /** The answer may wait until there is room that nobody else wants. */
  batch?: boolean;
  /** Aborting it cancels the answer; its reason is thrown. */
  signal?: AbortSignal;
  /** The same id is the same answer, paid for once; absent: a new one. */
  requestId?: string;
  /** Go on with an answer that was asked for before, with this `requestId`: the number of the last event that was dealt with. */
  lastEventId?: number;
}

/** A message of OpenAI's list. */
export interface Message {
  role: string;
  [field: string]: unknown;
}

/** An event of an answer. Those with a number are kept by the server, and come once each. */
export type Event =
  | { type: "sent" }
  | { type: "queued"; position: number; eta: number }
  | { type: "waiting"; code: string; message: string; seconds: number }
  | { type: "processing"; number: number; provider?: string; model?: string; conversationId?: string }
  | { type: "text"; number: number; text: string }
  | { type: "reasoning"; number: number; text: string }
  | { type: "toolCalls"; number: number; deltas: unknown[] }
  | Complete;

/** The last event of a whole answer. */
export interface Complete {
  type: "complete";
  number: number;
  finishReason?: string;
  usage: Record<string, unknown> | null;
  provider?: string;
  model?: string;
}

/** What the connection is doing. `code` is the close code, `fault` the server's error, if it gave one. */
export type State =
  | { name: "idle" | "connecting" | "open" }
  | { name: "queued"; position: number; eta: number }
  | { name: "lost"; code: number; fault?: Fault; until: number }
  | { name: "closed"; code: number; fault?: Fault };

/** An error as the server sends it. */
export interface Fault {
  code?: string;
  error: string;
  retryable?: boolean;
  retry_after?: number;
}

/** The answer to a question. It is asked when it is read, and read once: as pieces of its text, as a whole text, or as events. */
export interface Answer extends AsyncIterable<string> {
  /** It changes when the question is asked again under another id. */
  readonly requestId: string;
  /** The last event of the answer; null until it has come. */
  readonly complete: Complete | null;
  events(): AsyncGenerator<Event>;
  text(): Promise<string>;
  /** Stop reading, and tell the server to stop; the loop that reads ends without an error. */
  cancel(): void;
}

/** Questions that follow each other. */
export interface Conversation {
  readonly id: string;
  chat(content: string, options?: ChatOptions): Answer;
}

/** A page of the list of conversations. Times are Unix seconds. */
export interface Conversations {
  conversations: { id: string; title: string; updated: number; messages: number }[];
  next: string | null;
  /** Whether the server cannot read its storage now, and shows only what it remembers. */
  partial: boolean;
}

/** A conversation, the oldest message first. */
export interface Turns {
  id: string;
  title: string;
  updated: number;
  messages: { role: "user" | "assistant"; text: string; time: number }[];
  partial: boolean;
  /** Whether older messages are kept that are not shown. */
  older: boolean;
}

/** The one error of an answer. `code` is the server's, or `deadline_exceeded`, `protocol_error` or `cancelled`. */
export class AnswerError extends Error {
  constructor(fault: Fault, question?: { id?: string; text?: string; shown?: boolean });
  readonly code: string;
  /** Whether the same question can succeed later, and nothing of its answer has come. */
  readonly retryable: boolean;
  /** Seconds after which the server wants to be asked again, if it has said so. */
  readonly retryAfter: number | null;
  readonly requestId: string;
  /** The text that has come before. */
  readonly text: string;
}

/** A client of one server, for any number of answers at once. */
export class Client {
  constructor(url: string | URL, options?: ClientOptions);
  readonly url: string;
  /** The paths of the faces, if they are not those of the shipped configuration. */
  endpoints: { websocket: string; sse: string; conversations: string };
  readonly state: State;
  chat(content: string | Message[], options?: ChatOptions): Answer;
  conversation(id?: string): Conversation;
  /** What the server keeps of the caller's conversations, the newest first. `next` is the `before` of the next page. */
  conversations(query?: { limit?: number; before?: string }): Promise<Conversations>;
  /** The messages of a conversation. */
  turns(id: string): Promise<Turns>;
  deleteConversation(id: string): Promise<void>;
  /** Connect now, but not before a full server wants it, and stay connected while nothing is asked. */
  connect(): void;
  /** Cancel the answers that run, and close the connection. */
  close(): void;
}

/** The seconds before connecting again after so many failures and a close code; null: never. */
export function reconnectDelay(code: number, failures: number, retryAfter?: number): number | null;

/** Seconds: *least*, and a part by chance of a span that doubles with each failure, up to 30 s; up to 8 s if *least* is more than 0. */
export function backoff(least: number, failures: number, span: number): number;
